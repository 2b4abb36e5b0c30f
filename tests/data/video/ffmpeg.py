"""FFmpeg's program in another build than PyAV's: makes clips that PyAV cannot, and decodes them independently."""

import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np

TIMEOUT_S = 60


def run(*arguments: object, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run FFmpeg. data: its standard input."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-y", *map(str, arguments)]
    done = subprocess.run(command, input=data or b"", capture_output=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done


def make(path: Path, frames: np.ndarray, fps: float, *options: object) -> Path:
    """Encode frames, uint8 or uint16 [F, H, W, 3]."""
    pixels = "rgb24" if frames.dtype == np.uint8 else "rgb48le"
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    raw = ("-f", "rawvideo", "-pix_fmt", pixels, "-s", size, "-r", fps, "-i", "-")
    run(*raw, *options, path, data=np.ascontiguousarray(frames).tobytes())
    return path


def shown(path: Path, filters: str = "null") -> tuple[np.ndarray, np.ndarray]:
    """The frames that FFmpeg displays: seconds after the first, and uint8 [F, H, W, 3]."""
    chain = f"{filters},showinfo,scale=flags=bicubic+accurate_rnd+full_chroma_int:interl=0,format=gbrp"
    done = run("-i", path, "-map", "0:V:0", "-fps_mode", "passthrough", "-vf", chain, "-f", "rawvideo", "-")
    text = done.stderr.decode(errors="replace")
    times = np.array([float(time) for time in re.findall(r"pts_time:\s*(-?[\d.]+)", text)])
    width, height = map(int, re.findall(r" s:(\d+)x(\d+) ", text)[-1])
    planes = np.frombuffer(done.stdout, np.uint8).reshape(-1, 3, height, width)
    return times - times[0], planes[:, [2, 0, 1]].transpose(0, 2, 3, 1)
