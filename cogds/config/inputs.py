"""The files and folders that a run config names as inputs."""

from cogds.config.schema import RunConfig


def data_paths(cfg: RunConfig) -> dict[str, str]:
    """Paths of the datasets, by config key."""
    paths: dict[str, str | None] = {}
    for index, data in enumerate(cfg.data.sets):
        paths |= {f"data.sets[{index}].path": data.path, f"data.sets[{index}].root": data.root}
    if not cfg.data.sets:
        paths |= {"data.path": cfg.data.path, "data.root": cfg.data.root}
    paths["eval.path"] = cfg.eval.path
    return {key: path for key, path in paths.items() if path is not None}


def prompt_files(cfg: RunConfig) -> dict[str, str]:
    """Images and videos of the prompts that training makes videos of, by config key."""
    prompts = cfg.sample.prompts if cfg.sample.every is not None else ()
    return {
        f"sample.prompts[{index}].{name}": file
        for index, prompt in enumerate(prompts)
        for name in ("image", "last_image", "video", "control")
        if (file := getattr(prompt, name))
    }
