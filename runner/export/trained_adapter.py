"""What is exported: a run's adapter, in place on its base model, and the settings that it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from runner.config.schema import Config, LoraConfig
from runner.config.validation import lora_scale
from runner.export.fused import fuse_adapter
from runner.models.load import BaseModel
from runner.models.lora import AdaptedModel, Params


@dataclass
class TrainedAdapter:
    """An adapter to export. A target may use up `adapted`: it is the last that does."""

    adapted: AdaptedModel | None
    """The base model with the adapter's layers."""
    weights: Params
    """The adapter's weights, as they are stored."""
    lora: LoraConfig
    """The adapter's shape."""
    config: Config
    """The settings of the run."""
    files: Mapping[str, bytes]
    """The adapter folder that stock mlx-lm loads, by name of the file."""
    log: Callable[[str], None]
    """Called with each line for the user."""
    load_as_stored: Callable[[], AdaptedModel] | None = None
    """Returns the model anew with its base quantized as its files have it; None where `adapted` is that already."""
    name: str = "run"
    """What messages call the adapter: run, or average."""

    def with_weights(self, weights: Params) -> AdaptedModel:
        """Return the model with these weights in place."""
        assert self.adapted is not None
        self.adapted.place(weights)
        self.adapted.model.eval()
        return self.adapted

    def fuse(self, *, dequantize: bool) -> BaseModel:
        """Return the base model with the adapter merged into it, and the chat template of the run; uses up `adapted`.

        Without `dequantize` the base is as its files have it.

        Raises:
            ModelError: a layer cannot be merged.
        """
        fused = fuse_adapter(self.take(dequantize=dequantize), dequantize=dequantize)
        set_template(fused, self.config)
        return fused

    def take(self, *, dequantize: bool) -> AdaptedModel:
        """Return the model with its weights in place, and use up `adapted`; as its files have it, or expanded."""
        if dequantize or self.load_as_stored is None:
            adapted, self.adapted = self.with_weights(self.weights), None
            return adapted
        self.adapted = None  # before the other is loaded
        return self.load_as_stored()


def resolved_lora(lora: LoraConfig) -> LoraConfig:
    """Return the same shape with its factor as `scale`."""
    return replace(lora, scale=lora_scale(lora), alpha=None, rslora=False)


def set_template(base: BaseModel, config: Config) -> None:
    """Give the tokenizer that is exported the chat template that the run used instead of the model's."""
    from runner.data.chat_template import TemplateOptions

    if (template := TemplateOptions.from_config(config.data).text) is not None:
        vars(base.tokenizer).get("_tokenizer", base.tokenizer).chat_template = template
