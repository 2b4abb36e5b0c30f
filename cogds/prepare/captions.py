"""Captions of scenes, written by a vision-language model behind an OpenAI-compatible endpoint (vLLM, Ollama, ...)."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from cogds.data.video.frames import read_frame, read_whole_image
from cogds.errors import UserError

DEFAULT_PROMPT = (
    "These are frames of one video, in order. Write a caption for training a text-to-video model: describe the "
    "subject, its appearance, what happens over time, the setting, the light and the movement of the camera. Write one "
    "paragraph of at most 120 words, in the present tense. Do not mention frames, images or the video itself."
)
PICTURE_SIDE = 768  # longer side of the frames that are sent [px]
# A reply that reaches this limit is cut off, and is not used. The model trains on 224 tokens.
MAX_TOKENS = 1024
NUM_RETRIES = 5  # after 429, 5xx, timeouts and lost connections, with growing pauses (the client's own)
_THOUGHTS = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True)
class CaptionOptions:
    """Which endpoint captions the scenes, and how.

    Attributes:
        model: name of the model, as the endpoint knows it.
        num_frames: frames of each scene that are sent, evenly spaced.
        num_requests: requests of each rank at the same time.
        timeout_s: of one request.
    """

    url: str
    model: str
    prompt: str = DEFAULT_PROMPT
    num_frames: int = 8
    num_requests: int = 4
    timeout_s: float = 120.0
    api_key: str = field(default="", repr=False)


@dataclass(frozen=True)
class CaptionTask:
    """A scene to caption. times_s: of the frames to send, in seconds after the file's first frame; () for an image."""

    path: str
    times_s: tuple[float, ...]


class CaptionError(Exception):
    """A scene has no caption. The message says why."""


def read_pictures(task: CaptionTask) -> list[str]:
    """The frames to send, as data URLs. Runs in a worker process. Raises DecodeError."""
    if not task.times_s:
        return [_data_url(read_whole_image(task.path, PICTURE_SIDE))]
    return [_data_url(read_frame(task.path, time_s, PICTURE_SIDE)) for time_s in task.times_s]


def _data_url(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Captioner:
    """Asks the endpoint for captions. May be used by several threads."""

    def __init__(self, options: CaptionOptions) -> None:
        from openai import OpenAI  # takes a second, and only captions need it

        self._options = options
        self._client = OpenAI(
            base_url=options.url,
            api_key=options.api_key or "none",  # the client insists on one, and local endpoints ignore it
            timeout=options.timeout_s,
            max_retries=NUM_RETRIES,
        )

    def close(self) -> None:
        """Abort all requests."""
        self._client.close()

    def caption(self, pictures: Sequence[str]) -> str:
        """The caption of a scene.

        pictures: data URLs. Raises CaptionError if this request fails for good, and UserError if all requests will,
        because the endpoint refuses the key or does not know the model.
        """
        import openai
        from openai.types.chat import ChatCompletion

        content: Any = [{"type": "text", "text": self._options.prompt}]
        content += [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
        try:
            reply = self._client.chat.completions.create(
                model=self._options.model,
                messages=[{"role": "user", "content": content}],
                max_tokens=MAX_TOKENS,
                temperature=0.0,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(
                f"--caption-url: {self._options.url} refuses the key ({_brief(error)}). Set OPENAI_API_KEY."
            ) from None
        except openai.NotFoundError as error:
            raise UserError(
                f"--caption-model: {self._options.url} does not know '{self._options.model}' ({_brief(error)}). "
                "Correct the name or the URL, which usually ends with /v1."
            ) from None
        except openai.OpenAIError as error:
            raise CaptionError(_brief(error)) from None
        except ValueError as error:  # not JSON
            raise CaptionError(f"the reply is not one of a chat model: {_brief(error)}") from None
        if not isinstance(reply, ChatCompletion):  # the URL of something else, such as a web page
            raise CaptionError("the reply is not one of a chat model")
        choice = reply.choices[0] if reply.choices else None
        text = _THOUGHTS.sub("", (choice.message.content or "") if choice else "").strip()
        if not choice or not text:
            raise CaptionError("the reply is empty")
        if choice.finish_reason == "length":
            raise CaptionError(f"the reply is longer than {MAX_TOKENS} tokens")
        return " ".join(text.split())


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
