"""What lies in the folder of a model: its weights, or an adapter that needs a base."""

from __future__ import annotations

from pathlib import Path

from distill_llm.core.errors import ConfigError


def is_adapter(source: str) -> bool:
    """Whether a folder holds an adapter, which needs its base."""
    return (Path(source).expanduser() / "adapter_config.json").is_file()


def weight_bytes(folder: str) -> int | None:
    """Size on disk of a folder's weights, those of an adapter's base included; None where one of them is not here."""
    own = sum(path.stat().st_size for path in Path(folder).expanduser().glob("*.safetensors"))
    if not own or not is_adapter(folder):
        return own or None
    from distill_llm.models.lora import base_of

    base = weight_bytes(base_of(folder)[0])
    return own + base if base else None


def check_weights(source: str, *, where: str) -> None:
    """Raises ConfigError where a folder's weights are missing or torn; looks at their heads alone, and not at a Hub."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return
    from safetensors import SafetensorError, safe_open

    files = [path for suffix in ("safetensors", "bin") for path in sorted(folder.glob(f"*.{suffix}"))]
    if not files:
        raise ConfigError(
            f"{where}: {folder} holds no weights (*.safetensors). Copy them there, or name another model."
        )
    for path in files:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{where}: {path} is damaged ({error}). Copy it again.") from None
