"""The arguments of a call: documents, teacher, student and options, checked before any work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jasper_fast.adaptation.embeddings import fixed_identity, is_vectors, vectors_config
from jasper_fast.adaptation.state import ADAPT, check_vacant
from jasper_fast.config.data import SourceConfig
from jasper_fast.config.layers import run_name
from jasper_fast.config.load import load_config, stored_config
from jasper_fast.config.models import TeacherConfig
from jasper_fast.config.run import Config
from jasper_fast.config.yaml import read_yaml
from jasper_fast.data.document_ids import check_document_ids
from jasper_fast.data.listing import user_path
from jasper_fast.data.text_sources import check_source, is_local
from jasper_fast.models.folder import FACTS_FILE
from jasper_fast.models.graph import find_graph
from jasper_fast.models.hub import configured_width, model_revision, resolve_model
from jasper_fast.models.sentence_transformer import check_embeds
from jasper_fast.teachers.model import check_custom_code
from jasper_fast.training.run.folder import CONFIG
from jasper_fast.utils.atomic import check_output_path, check_writable
from jasper_fast.utils.errors import ConfigError, JasperError
from jasper_fast.utils.names import HUB_NAMES, looks_like_path

MINUTES = 10.0  # of training, if no student is given
LONGEST = 512  # tokens that a teacher reads of a document
STUDENT = "student"  # folder of the run that trains the student, in that of the adaptation
GIVE_TEACHER = "Fix: give --teacher, the model whose embeddings the student should reach"


@dataclass(frozen=True)
class Request:
    """A checked call.

    Args:
        documents: the text source as typed.
        out: folder of the adaptation.
        config: the configuration of ``train --texts`` for these documents and this teacher.
        teacher: the teacher: a model or precomputed vectors.
        model: the given student as a model to encode with. None: it is trained.
        minutes: minutes of training. None: the given student is used as it is.
        widths: widths to export besides the full one, widest first. None: the student's, or 128, 64 and 32.
        max_length: tokens that the student reads. None: it is chosen.
        trust_remote_code: permission to run code of the student.
    """

    documents: str
    out: Path
    config: Config
    teacher: TeacherConfig
    model: TeacherConfig | None
    minutes: float | None
    widths: tuple[int, ...] | None
    max_length: int | None
    trust_remote_code: bool = False

    @property
    def source(self) -> SourceConfig:
        """The text source."""
        return self.config.data.sources[0]

    @property
    def teacher_name(self) -> str:
        """The teacher as given."""
        return str(self.teacher.model or self.teacher.vectors)

    def settings(self) -> dict[str, Any]:
        """Return what may not change between the calls of one adaptation, as JSON."""
        settings = {
            "teacher": fixed_identity(self.teacher),
            "student": fixed_identity(self.model) if self.model is not None else "trained",
            "minutes": self.minutes,
            "columns": list(self.source.columns),
            "max_length": self.max_length,
        }
        return json.loads(json.dumps(settings))


def make_request(
    documents: str | Path,
    out: str | Path,
    *,
    teacher: str | None = None,
    model: str | None = None,
    minutes: float | None = None,
    columns: Sequence[str] = ("text",),
    id_column: str | None = None,
    widths: Sequence[int] | None = None,
    max_length: int | str = "auto",
    cache: str | Path = "cache",
    trust_remote_code: bool = False,
) -> Request:
    """Check the arguments of a call.

    Args:
        documents: text source: a file, a folder, or a ``datasets`` name.
        out: folder of the adaptation.
        teacher: model, or file or folder of precomputed vectors. None: the student's teacher, or the default one.
        model: trained student. None: one is trained.
        minutes: minutes of training. None: 10 without a model, and none with one.
        columns: columns to join to one document.
        id_column: column of ids, by which vectors may be matched.
        widths: widths to export besides the full one. None: the student's.
        max_length: tokens that the student reads, or "auto".
        cache: folder of texts and embeddings.
        trust_remote_code: permission to run code of the models.

    Raises:
        JasperError: an argument is impossible, or a model, file or folder cannot be used.
    """
    path = Path(out).expanduser()
    chosen_length, chosen_minutes, chosen_widths = _length(max_length), _minutes(minutes, model), _widths(widths)
    check_output_path(path)
    check_vacant(path)
    source = _source(documents, columns, id_column)
    if teacher is None or not is_vectors(teacher):  # else the ids match the vectors, which reports more
        _check_ids(source)
    check_writable(Path(cache).expanduser())
    overrides: list[tuple[str, Any]] = [
        ("data.sources", [source.model_dump(mode="json", exclude_defaults=True)]),
        ("data.cache", str(cache)),
        ("name", run_name(path)),
    ]
    student = None
    if model is not None:
        _check_student(model)
        student = TeacherConfig(model=model, max_length=10**6, trust_remote_code=trust_remote_code)
    if teacher is None:
        teaching = teacher_of(model) if model is not None else _default_teacher()
    elif is_vectors(teacher):
        overrides += [("data.cut_share", 0), ("data.shuffle_share", 0)]
        probe = load_config(None, [*overrides, ("teachers", [{"vectors": teacher}])])
        teaching = vectors_config(teacher, probe)
    else:
        teaching = TeacherConfig(model=teacher, max_length=LONGEST, trust_remote_code=trust_remote_code)
    if teaching.model is not None:
        _check_pytorch(teaching.model)
        check_embeds(resolve_model(teaching.model), teaching.model, teaching.revision)
    check_custom_code(teaching)
    overrides.append(("teachers", [teaching.model_dump(mode="json", exclude_defaults=True)]))
    config = load_config(None, overrides)
    request = Request(
        str(documents), path, config, teaching, student, chosen_minutes, chosen_widths, chosen_length, trust_remote_code
    )
    if (width := _teacher_width(teaching)) is not None:
        check_widths(request, width)
    return request


def _check_pytorch(teacher: str) -> None:
    if find_graph(teacher) is not None:
        raise JasperError(
            f"{teacher}: an ONNX graph cannot be the teacher of an adaptation, whose asymmetric form holds the teacher "
            "in PyTorch form. Fix: give --teacher the model in PyTorch form, or a file with the documents' vectors"
        )


def check_widths(request: Request, width: int) -> None:
    """Reject widths that the teacher does not have.

    Args:
        request: the call.
        width: the teacher's width.

    Raises:
        JasperError: a width is too large.
    """
    if request.widths and request.widths[0] > width:
        raise JasperError(
            f"--widths: {request.widths[0]} is wider than the teacher (got {request.widths[0]}, expected at most "
            f"{width}). Fix: leave it out"
        )


def teacher_of(model: str) -> TeacherConfig:
    """Return the teacher that a student was trained with, reading whole documents.

    Args:
        model: run folder, model folder or name.

    Raises:
        JasperError: it is unknown, there were several, or it was a file of vectors.
    """
    folder = Path(resolve_model(model)).expanduser()
    for file in (folder / CONFIG, folder.parent / CONFIG):
        if file.is_file():
            return _single(_stored_teachers(file), model)
    return _single(_teachers_of_facts(folder), model)


def same_space(student: str, teacher: TeacherConfig) -> bool | None:
    """Return whether a student was trained in a teacher's space. None: its folder does not say with which teacher.

    Args:
        student: run folder, model folder or name.
        teacher: the teacher.
    """
    facts = _facts(Path(resolve_model(student)).expanduser()).get("teachers") or []
    if not facts or teacher.model is None:
        return None
    whole = teacher.truncate_dim is None and teacher.dense is None and teacher.pooling == "auto"
    revisions = [fact.get("revision") for fact in facts if isinstance(fact, dict)]
    return whole and len(facts) == 1 and revisions == [model_revision(teacher.model, teacher.revision)]


def _teacher_width(teacher: TeacherConfig) -> int | None:
    """Return the teacher's width if its files say it. The loaded teacher is checked again."""
    if teacher.model is None or teacher.dense is not None or teacher.truncate_dim is not None:
        return teacher.truncate_dim
    return configured_width(teacher.model, teacher.revision)


def _source(documents: str | Path, columns: Sequence[str], id_column: str | None) -> SourceConfig:
    if isinstance(columns, str) or not columns or not all(isinstance(c, str) and c.strip() for c in columns):
        raise JasperError(f"columns: got {columns!r}, expected names of columns. Fix: give for example title,text")
    source = SourceConfig(path=str(documents), columns=list(columns), id_column=id_column)
    if is_local(source):
        check_source(source)
    return source


def _check_ids(source: SourceConfig) -> None:
    """Reject ids that an index could not have: null, repeated, or in a column that is missing."""
    if source.id_column is not None:
        check_document_ids(source, source.id_column)


def _length(max_length: int | str) -> int | None:
    if max_length == "auto":
        return None
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise JasperError(f"max_length: got {max_length!r}, expected auto or a number of tokens. Fix: give 256")
    return max_length


def _minutes(minutes: float | None, model: str | None) -> float | None:
    if minutes is None:
        return MINUTES if model is None else None
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 < minutes < 10**6:
        fix = "leave minutes out to fit the model as it is" if model is not None else "give 10, for example"
        raise JasperError(f"minutes: got {minutes!r}, expected a number above 0. Fix: {fix}")
    return float(minutes)


def _widths(widths: Sequence[int] | None) -> tuple[int, ...] | None:
    if widths is None:
        return None
    if not widths or not all(type(width) is int and width > 0 for width in widths):
        raise JasperError(f"widths: got {list(widths)}, expected numbers of coordinates. Fix: give for example 128,64")
    return tuple(sorted(set(widths), reverse=True))


def _check_student(model: str) -> None:
    folder = Path(resolve_model(model)).expanduser()
    if (user_path(model) / ADAPT).is_file():
        raise JasperError(
            f"{model} is an adaptation, and a student is expected. Fix: give the student that was adapted "
            f"({user_path(model) / STUDENT}, or the --model of that call)"
        )
    if looks_like_path(model) and not folder.is_dir():
        raise JasperError(f"{model}: there is no such folder. Fix: give a run folder, a model's folder or a name")
    check_embeds(str(folder), model)
    model_revision(model)


def _default_teacher() -> TeacherConfig:
    """Return the teacher of ``train --texts``, reading whole documents."""
    return load_config().teachers[0].model_copy(update={"max_length": LONGEST})


def _stored_teachers(file: Path) -> list[TeacherConfig]:
    try:
        return stored_config(dict(read_yaml(file, str(file))), str(file)).teachers
    except (ConfigError, TypeError, ValueError) as error:
        raise JasperError(f"{file}: the student's teacher cannot be read ({error}). {GIVE_TEACHER}") from error


def _teachers_of_facts(folder: Path) -> list[TeacherConfig]:
    """Return the teachers that a model folder names, by the names under which they are on this machine."""
    local = {hub: name for name, hub in HUB_NAMES.items() if _is_here(name)}
    names = [fact["model"] for fact in _facts(folder).get("teachers") or [] if isinstance(fact, dict)]
    if any(str(name).startswith("embeddings in ") for name in names):
        return [TeacherConfig(vectors=str(name).removeprefix("embeddings in ")) for name in names]
    return [TeacherConfig(model=local.get(str(name), str(name))) for name in names]


def _is_here(name: str) -> bool:
    try:
        resolve_model(name)
    except JasperError:
        return False
    return True


def _facts(folder: Path) -> dict[str, Any]:
    file = folder / FACTS_FILE
    try:
        facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _single(teachers: list[TeacherConfig], model: str) -> TeacherConfig:
    if not teachers:
        raise JasperError(f"{model}: its folder does not say which teacher it was trained with. {GIVE_TEACHER}")
    if len(teachers) > 1:
        raise JasperError(f"{model} was trained with {len(teachers)} teachers, and one is expected. {GIVE_TEACHER}")
    if teachers[0].model is None:
        raise JasperError(
            f"{model} was trained with the vectors {teachers[0].vectors}, which may not be those of these documents. "
            "Fix: give --teacher, vectors of these documents or a model"
        )
    return teachers[0].model_copy(update={"max_length": max(LONGEST, teachers[0].max_length)})
