"""Old module names as aliases, kept for one release: ``jasper_fast.files`` is now ``jasper_fast.utils.atomic``.

Importing an old module, or an old name from one, works and raises a DeprecationWarning with the new place.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

REMOVED_IN = "0.3"
# Old module: the modules that its names are in now.
MODULES: dict[str, str] = {
    "arrow": "utils.arrow_files",
    "batches": "training.pooled training.prefetch training.sampler training.data training.preflight",
    "binned": "losses.relative_binned",
    "cache": "teachers.cache",
    "captions": "data.captions",
    "card": "reporting.model_card models.folder utils.names",
    "checkpoint": "training.run.checkpoint",
    "checks": "training.step config.run training.parameters training.preflight",
    "codes": "models.quantization evaluation.quantized",
    "command_line": "utils.command_line",
    "config": (
        "config.types config.load config.data config.models config.run config.stage "
        "config.loss_weights config.diff config.losses"
    ),
    "config_checks": "config.models config.run config.stage",
    "config_overrides": "config.overrides utils.names",
    "config_problems": "config.messages config.schema config.diff models.probes",
    "config_text": "config.yaml",
    "cost": "ops.cost",
    "data": "data.text_dataset data.prepare data.text",
    "docstrings": "data.docstrings",
    "encode": "models.micro_batches utils.device models.encode",
    "encoders": "models.embedder teachers.encoder",
    "env": "utils.hardware ops.native",
    "errors": "utils.errors",
    "eval_files": "data.eval_files",
    "evalsets": "data.eval_sets data.eval_loaders",
    "evaluate": "evaluation.score data.eval_loaders",
    "export": "models.folder exporting.onnx exporting.flat exporting.student",
    "extension": "ops.native",
    "files": "utils.atomic",
    "finish": "train training.finish",
    "gather": "distributed.gather",
    "glyphs": "data.glyphs",
    "image_data": "data.image_dataset",
    "image_sources": "data.image_sources",
    "images": "data.image_files",
    "judgements": "data.judgements",
    "lending": "teachers.reuse",
    "listing": "data.listing",
    "loading": "models.loading",
    "log": "training.run.log config.losses",
    "losses": "losses.combined losses.relative_similarity losses.similarity losses.reference",
    "metrics": "evaluation.metrics",
    "model": "models.student",
    "models": "models.hub utils.names",
    "neighbours": "training.neighbours",
    "ops": "losses.relative_exact kernels.pair_losses ops.dispatch",
    "output": "utils.output",
    "parity": "exporting.parity",
    "plots": "reporting.plots config.losses",
    "prepare": "training.preflight models.student training.stages.base",
    "pretrained": "models.backbone models.layers",
    "probes": "models.probes",
    "ranks": "distributed.ranks",
    "reference": "losses.reference",
    "report": "reporting.report",
    "roll": "distributed.liveness",
    "row_order": "teachers.row_order",
    "row_reader": "data.rows",
    "run_folder": "training.run.folder",
    "sampler": "training.sampler",
    "sharding": "distributed.fsdp",
    "sources": "data.text_sources",
    "stages": "training.stages.losses training.optim training.parameters training.stages.base",
    "starts": "training.head_init",
    "step": "training.memory training.offload training.step",
    "stock": "models.sentence_transformer",
    "targets": "teachers.opening",
    "teach": "teachers.label",
    "teachers": "teachers.model",
    "text": "data.text",
    "train": "training.run.signals training.loop",
    "treatment": "data.augment",
    "vector_files": "teachers.embedding_files",
    "vectors": "teachers.precomputed",
    "vision": "models.vision_tower",
    "vision_batches": "training.stages.vision models.micro_batches",
    "vision_eval": "evaluation.images reporting.contact_sheet reporting.tables",
    "vision_loss": "losses.contrastive training.stages.losses",
    "webdataset": "data.webdataset",
    "average": "training.ema",
    "telemetry": "training.run.gpu_monitor",
    "mips.device": "mips.cuda",
    "mips.pieces": "mips.segment",
    "mips.sample": "mips.threshold",
    "mips.scan": "mips.cpu",
    "mips.search": "mips.top_k",
    "mips.settle": "mips.rerank",
    "mips.signs": "mips.binary",
    "mips.state": "mips.topk_state",
    "mips.stream": "mips.prefetch",
}
# Old names that were renamed as well, by old module.
NAMES: dict[str, str] = {
    "batches.AHEAD": "PREFETCHED_BATCHES",
    "binned.DEVICE_STRIP": "DEVICE_BLOCK_SCORES",
    "binned.STRIP": "BLOCK_SCORES",
    "cache.TeacherVectors": "TeacherEmbeddings",
    "cache.storing_error": "storage_error",
    "codes.coded": "quantize_groups",
    "codes.known_precisions": "parse_precisions",
    "command_line.LARGEST": "MAX_NUMBER",
    "command_line.Once": "StoreOnce",
    "command_line.whole_number": "positive_int",
    "config_problems.OTHER_NAMES": "SYNONYMS",
    "config_problems.as_argument": "argument_message",
    "data.BUFFERED": "MAX_BUFFERED_CHARS",
    "data.EXCHANGE_ROWS": "REPLACER_ROWS",
    "data.with_trained_piece": "count_trained_pieces",
    "docstrings.POOL_SHARE": "HELD_OUT_FRACTION",
    "eval_files.find": "find_file",
    "evaluate.evaluate_vectors": "evaluate_embeddings",
    "evaluate.kept_share": "percent_of_teacher",
    "evaluate.remark_lines": "note_lines",
    "files.check_place": "check_output_path",
    "files.check_room": "check_disk_space",
    "glyphs.BASE_LINE": "BASELINE",
    "glyphs.SIZE_OF_EM": "FONT_SIZE",
    "image_data.KEPT_PIXELS": "MAX_CACHED_BYTES",
    "image_data.TOLD": "MAX_LISTED",
    "image_data.images_built": "images_cached",
    "image_data.tied": "connected_groups",
    "image_data.try_images": "check_images",
    "image_sources.shown": "printable",
    "images.DAMAGE": "DECODE_ERRORS",
    "images.MAX_FILE": "MAX_FILE_BYTES",
    "images.OTHER_KINDS": "OTHER_FORMATS",
    "images.PICTURES": "IMAGE_SUFFIXES",
    "images.STILL_PICTURES": "STILL_IMAGE_BRANDS",
    "images.need_pillow": "require_pillow",
    "images.upright": "to_upright_rgb",
    "judgements.ENDINGS": "SUFFIXES",
    "judgements.NEEDED": "COLUMNS_FIX",
    "lending.Lenders": "CacheReuse",
    "lending.Lent": "ReusedEmbeddings",
    "loading.NESTING": "MAX_WRAPPERS",
    "loading.SHOWN": "MAX_LISTED",
    "loading.counts_from_padding": "has_padding_offset",
    "loading.recorded_loads": "record_loads",
    "log.PARTS": "LOGGED_LOSSES",
    "metrics.DEEPEST": "MAX_DEPTH",
    "metrics.score_vectors": "score_embeddings",
    "models.DECIDING": "IDENTITY_FILES",
    "models.OWN_CODE": "CUSTOM_CODE",
    "models.own_prompts": "model_prompts",
    "models.settings_of": "read_settings",
    "parity.check_same": "check_flat_export",
    "plots.PARTS": "LOGGED_LOSSES",
    "plots.SMOOTH_SHARE": "SMOOTH_FRACTION",
    "pretrained.OTHER_STUDENT": "OTHER_STUDENT_FIX",
    "pretrained.give_pad_token": "ensure_pad_token",
    "pretrained.no_layers": "unknown_layers_message",
    "pretrained.sees_later_tokens": "is_bidirectional",
    "pretrained.switch_dropout_off": "disable_dropout",
    "probes.FAILURES": "ENCODER_ERRORS",
    "probes.explained": "explain_failures",
    "report.TOLD": "MAX_LISTED",
    "row_order.FEWEST": "MIN_ROWS",
    "row_order.FEWEST_FOR_PARTS": "MIN_ROWS_FOR_PARTS",
    "row_reader.KINDS": "TEXT_SUFFIXES",
    "row_reader.KNOWN": "SUPPORTED_FILES",
    "row_reader.MARKS": "BYTE_ORDER_MARKS",
    "row_reader.PACKED": "COMPRESSION_SUFFIXES",
    "row_reader.QUOTED": "QUOTED_CELL",
    "row_reader.STARTS": "COMPRESSION_SIGNATURES",
    "row_reader.no_column": "missing_column",
    "row_reader.packed": "with_compressed",
    "row_reader.reading": "explain_read_errors",
    "row_reader.unpacked_name": "uncompressed_name",
    "run_folder.MAY_CHANGE": "NEUTRAL_SECTIONS",
    "run_folder.what_decides": "result_settings",
    "sharding.own_part": "local_part",
    "sharding.set_whole": "copy_full_tensor",
    "sharding.whole": "full_tensor",
    "sources.NAMED": "MAX_LISTED",
    "sources.NOTES": "NOTE_NAMES",
    "sources.draw": "sample_texts",
    "sources.numbered": "enumerate_rows",
    "sources.say_ignored": "report_ignored",
    "sources.try_source": "check_source",
    "stock.OTHER_MODEL": "OTHER_MODEL_FIX",
    "targets.Place": "Worker",
    "targets.share": "assigned_shards",
    "teach.SILENCE": "MAX_WAIT_SECONDS",
    "teachers.check_own_code": "check_custom_code",
    "teachers.own_device": "local_device",
    "treatment.EXCHANGED": "REPLACED_FRACTION",
    "treatment.Exchanges": "WordReplacer",
    "treatment.treat": "cut_and_shuffle",
    "vector_files.LARGEST": "MAX_VALUE",
    "vector_files.VectorFile": "EmbeddingFile",
    "vector_files.open_vectors": "open_embedding_file",
    "vector_files.vector_paths": "embedding_paths",
    "vectors.LARGEST_SAMPLE": "MAX_SAMPLE",
    "vectors.ReadyVectors": "PrecomputedEmbeddings",
    "vectors.SAME": "MIN_COSINE",
    "vectors.describe_vectors": "describe_precomputed",
    "vision.add_marks": "add_boundary_tokens",
    "vision_batches.draw_views": "draw_affine_maps",
    "vision_batches.other_views": "warp_images",
    "vision_eval.evaluate_pictures": "evaluate_images",
    "vision_eval.pictures_line": "images_line",
    "vision_loss.SAME": "DUPLICATE_TOLERANCE",
    "vision_loss.unevenness": "hubness",
    "webdataset.TARS": "TAR_SUFFIXES",
    "average.keep_average": "track_ema",
    "average.take_average": "load_ema",
    "telemetry.Telemetry": "GpuMonitor",
    "mips.pieces.Piece": "Segment",
    "mips.pieces.Plane": "Planes",
    "mips.pieces.int8_plane": "Planes.of",
    "mips.state.State": "TopKState",
    "step.Shares": "StepTimer",
    "step.dropout_factors": "dropout_mask",
    "neighbours.kept_graph": "cached_graph",
    "vision_loss.Told": "LossInputs",
    "roll.Roll": "Liveness",
}


def find(old: str, name: str, stacklevel: int = 3) -> tuple[ModuleType, Any]:
    """Return the module that a name of an old module is in now, and its value.

    Args:
        old: the old module without the package, such as "files".
        name: a function, class or constant of it.
        stacklevel: number of calls between the user's line and this one, for the warning.

    Raises:
        AttributeError: the old module had no such name, or it was removed.
    """
    new = NAMES.get(f"{old}.{name}", name)
    for module in MODULES.get(old, "").split():
        try:
            place = importlib.import_module(f"{__package__}.{module}")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == __package__:
                raise
            continue  # the module needs an optional package, such as triton
        value = getattr(place, new, None)
        if value is not None and not isinstance(value, ModuleType):
            warnings.warn(
                f"{__package__}.{old}.{name} is now {place.__name__}.{new}; the old name works until {REMOVED_IN}",
                DeprecationWarning,
                stacklevel=stacklevel,
            )
            return place, value
    raise AttributeError(f"module '{__package__}.{old}' has no attribute {name!r}")


def old_names(module: str, stacklevel: int = 3) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module that still exists and lost some of its names to others."""
    old = module.removeprefix(f"{__package__}.")

    def get(name: str) -> Any:
        # `from package import submodule` asks the package for the name first. No old name hides a submodule.
        if name.startswith("__") or _has_submodule(module, name):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return find(old, name, stacklevel)[1]

    return get


def _has_submodule(module: str, name: str) -> bool:
    """Return True if a module is a package with a submodule of that name."""
    path = getattr(sys.modules[module], "__path__", None)
    return path is not None and importlib.machinery.PathFinder.find_spec(f"{module}.{name}", path) is not None


class _OldModule(ModuleType):
    """A module whose names are looked up in the modules that took its place."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return find(self.__name__.removeprefix(f"{__package__}."), name)[1]

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):
            super().__setattr__(name, value)
        else:
            setattr(find(self.__name__.removeprefix(f"{__package__}."), name)[0], name, value)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find the modules of the table under their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for an old name, and None for any other module."""
        package, _, old = fullname.partition(".")
        known = package == __package__ and old in MODULES
        return importlib.machinery.ModuleSpec(fullname, self) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Make the alias."""
        return _OldModule(spec.name, f"Alias of {MODULES[spec.name.partition('.')[2]]}, kept until {REMOVED_IN}.")

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: names are looked up when they are used."""


def install() -> None:
    """Make the old names importable. They are looked up last, after every module that exists."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
