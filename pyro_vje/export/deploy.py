"""A trained model as one file that runs without this package, and a model card beside it.

The file maps uint8 RGB images ``(N, 3, S, S)``, N free, to ``embedding``, ``loc`` and ``scale`` ``(N, D)`` (float32),
``score`` ``(N,)`` (float64, higher for stranger images) and, if the run has held-out images, ``p_value`` ``(N,)``
(float64). Pixel normalisation, the noise of the particles, reference images and calibration scores are constants in it.
"""

import io
import json
import math
import warnings
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from torch import Tensor, nn

from pyro_vje.anomaly.judge import HOW, Judge, prepare
from pyro_vje.anomaly.parts import LikelihoodParts
from pyro_vje.config import ScoreConfig
from pyro_vje.data.decode import MARGIN
from pyro_vje.distributions.numerics import _stirling
from pyro_vje.model.encoding import Encoded, encode_images, head
from pyro_vje.model.likelihoods import get_family
from pyro_vje.representation.evaluation import format_table
from pyro_vje.runs.files import check_writable, sha256, write_atomic
from pyro_vje.runs.folder import CONFIG, HEADER_KEY, WEIGHTS, load_run, versions

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
CARD = "MODEL_CARD.md"
TOLERANCE = 1e-4
"""Largest difference from the model, of the largest number of an output: rounding of another order is below it."""

FOLDS_TOLERANCE = 0.01
"""The same of a p-value by folds: rounding moves a few scores past those of calibration images."""

Arrays = dict[str, NDArray[Any]]


class ExportResult(NamedTuple):
    """What `export` wrote: the file, the card, and each output's largest difference from the model's own."""

    path: Path
    card: Path
    differences: dict[str, float]


class Deployed(nn.Module):
    """A run, a score and its calibration as one function of uint8 images; the outputs are those of the module."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.score, self.scorer, known = judge.score, judge.scorer, judge.calibration
        self.vje, self.view = judge.run.vje, judge.run.info.view
        self.fold_scorers = known.scorers if known else ()
        self.heads = nn.ModuleList(own.vje for own in self.fold_scorers)
        self.folds = [torch.from_numpy(fold) for fold in known.folds] if known else []

    def forward(self, images: Tensor, at_once: bool = True) -> dict[str, Tensor]:
        """Outputs by name; in parts, as `pyro_vje.score` computes them, where not ``at_once``."""
        encoded = encode_images(self.vje, self.view, images, turns=self.score.of == "rotations")
        score = self.score(LikelihoodParts(self.scorer, encoded, at_once=at_once))
        outputs = {"embedding": encoded.embeddings, "loc": encoded.loc, "scale": encoded.scale, "score": score}
        if self.folds:
            scores = [] if self.fold_scorers else [score]
            for scorer in self.fold_scorers:
                own = Encoded(*head(scorer.vje, encoded.features))
                scores.append(self.score(LikelihoodParts(scorer, own, at_once=at_once)))
            at_least = [(x >= s.unsqueeze(-1)).sum(-1) for x, s in zip(self.folds, scores, strict=True)]
            outputs["p_value"] = (1 + torch.stack(at_least).sum(0)).double() / (sum(map(len, self.folds)) + 1)
        return outputs


def export(ckpt: str | Path, *, format: str = "onnx", **settings: Any) -> ExportResult:
    """Write a run as one file, checked against the model on random images, and `MODEL_CARD.md` beside it.

    ``ckpt`` is a run folder or weights file; p-values and scores that compare with reference images need the folder.
    ``format`` is ``"onnx"`` (needs the extra ``export``), or ``"torch"``: a program for `torch.export.load`. The
    ``settings`` are those of `pyro_vje.score`, whose numbers the file's are: ``out`` (by default ``model.onnx`` or
    ``model.pt2`` in the run folder), ``score``, ``score_likelihood``, ``calibration``,
    ``num_particles``, ``seed``, ``trust_plugins``. A ``ValueError`` says which name is unknown or extra missing, that
    the model uses what cannot be exported, or that the file would not compute what the model does.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    for package in ("onnx", "onnxruntime", "onnxscript") if format == "onnx" else ():
        if find_spec(package) is None:
            raise ValueError(f"ONNX needs {package}: pip install 'pyro-vje[export]'")
    how, name = ScoreConfig(**settings), f"model{FORMATS[format]}"
    target = check_writable(how.out or (Path(ckpt) / name if Path(ckpt).is_dir() else Path(name)))
    run = load_run(ckpt, trust_plugins=how.trust_plugins)
    run.vje.encoder.to(memory_format=torch.contiguous_format)
    judge = prepare(run, how)
    how, known = judge.settings, judge.calibration
    description = {**run.info.to_dict(), "score": {name: getattr(how, name) for name in HOW}}
    del description["config"]["data_dir"]  # where the data lay concerns nobody else
    shape = (3, run.info.image_size, run.info.image_size)
    batches = [torch.randint(0, 256, (n, *shape), dtype=torch.uint8) for n in (2, 1, 5)]
    with torch.no_grad(), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch and onnxscript say of themselves
        model = Deployed(judge).eval()
        wanted = [{k: v.numpy() for k, v in model(images, at_once=False).items()} for images in batches]
        model(batches[0])  # what is computed once and kept must be there before tracing
        try:
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(model, (batches[0],), dynamic_shapes=shapes, strict=False)
            content, compute = _WRITERS[format](program, list(wanted[0]), json.dumps(description))
            found = [compute(images) for images in batches]
        except Exception as error:  # the user's encoder, likelihood or score may hold anything
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            what = f"encoder {run.info.config.encoder!r} with likelihood {judge.scorer.family.name!r}"
            why = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
            raise ValueError(f"{what} and score {how.score!r} cannot be exported as {format}: {why}") from error
    differences = dict.fromkeys(wanted[0], 0.0)
    for outputs, values in zip(found, wanted, strict=True):
        tolerances = {name: TOLERANCE * np.abs(value).max() for name, value in values.items()}
        if known is not None and known.scorers:
            tolerances["p_value"] = FOLDS_TOLERANCE
        elif known is not None:  # of the file's own score, which rounding may move past one
            values["p_value"] = known.p_values(outputs["score"])
        for name, value in values.items():
            difference = float(np.abs(outputs[name] - value).max())
            differences[name] = max(differences[name], difference)
            if outputs[name].shape != value.shape or not difference <= tolerances[name]:
                raise ValueError(f"{target} is not written: its {name} would differ by {difference:g}")
    write_atomic(target, content)
    card = target.with_name(CARD)
    write_atomic(card, model_card(judge, differences, file=target.name, format=format))
    return ExportResult(target, card, differences)


# Formats --------------------------------------------------------------------------------------------------------------

Written = tuple[bytes, Callable[[Tensor], Arrays]]
"""A file's content, and what it computes once read again."""


def _write_torch(program: torch.export.ExportedProgram, names: list[str], description: str) -> Written:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={HEADER_KEY: description})
    buffer.seek(0)
    module = torch.export.load(buffer).module()
    return buffer.getvalue(), lambda images: {k: v.numpy() for k, v in module(images).items()}


def _write_onnx(program: torch.export.ExportedProgram, names: list[str], description: str) -> Written:
    import onnx
    import onnxruntime

    table = torch.export.default_decompositions()  # PyTorch's own are exact where ONNX's are not: log-sigmoid
    table.update(_DECOMPOSITIONS)
    program = program.run_decompositions(table)
    exported = torch.onnx.export(program, dynamo=True, output_names=names, verbose=False)
    proto = exported.model_proto  # type: ignore[union-attr]
    onnx.helper.set_model_props(proto, {HEADER_KEY: description})
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: dict(zip(names, session.run(names, {"images": images.numpy()}), strict=True))


_WRITERS = {"onnx": _write_onnx, "torch": _write_torch}


def _lgamma(x: Tensor) -> Tensor:
    """Stirling's series at x + 16, undone by lgamma(x + 1) = lgamma(x) + log x; for positive x, to 1e-14."""
    y = x.double() + 16
    series = (y - 0.5) * y.log() - y + 0.5 * math.log(2 * math.pi) + _stirling(y)
    return (series - (x.double().unsqueeze(-1) + torch.arange(16)).log().sum(-1)).to(x.dtype)


def _atan2(y: Tensor, x: Tensor) -> Tensor:
    """ONNX Runtime has it in float32 only: a float64 angle is made of that and one Newton step."""
    if y.dtype != torch.float64:
        return NotImplemented
    norm = _hypot(y, x)
    sin, cos = y / norm, x / norm
    angle = torch.atan2(sin.float(), cos.float()).double()
    return angle + sin * angle.cos() - cos * angle.sin()


def _log1p(x: Tensor) -> Tensor:
    """Kahan's: ONNX has log(1 + x), which is zero for the small x that a Student-t near the Gaussian has."""
    y = 1 + x
    return torch.where(y == 1, x, y.log() * (x / (y - 1)))


def _hypot(x: Tensor, y: Tensor) -> Tensor:
    return (x.square() + y.square()).sqrt()


_DECOMPOSITIONS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.lgamma.default: _lgamma,
    torch.ops.aten.log1p.default: _log1p,
    torch.ops.aten.hypot.default: _hypot,
    torch.ops.aten.atan2.default: _atan2,
    torch.ops.aten.asin.default: lambda x: _atan2(x, ((1 - x) * (1 + x)).sqrt()),
}
"""What the likelihoods need and ONNX lacks."""


# The card -------------------------------------------------------------------------------------------------------------


def model_card(judge: Judge, differences: dict[str, float], **file: str) -> str:
    """A run's card in Markdown: its settings, what its folder holds of measured numbers, and its ``file, format``."""
    run, settings = judge.run, judge.settings
    names = ("eval.json", "scores_summary.json", CONFIG)
    paths = [None if run.folder is None else run.folder / name for name in names]
    evaluation, scored, written = (json.loads(x.read_text()) if x and x.is_file() else None for x in paths)
    if scored is not None and run.folder is not None:
        weights = sha256(run.folder / WEIGHTS)
        scored = scored if scored["weights_sha256"] == weights and scored["metrics"] else None
    private = ("data_dir", "download", "workers")
    card = files("pyro_vje.export").joinpath("model_card.md").read_text("utf-8") + "\n"  # Jinja drops the last
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    config = run.info.config
    return environment.from_string(card).render(
        info=run.info,
        config=config,
        settings={name: value for name, value in config.to_dict().items() if name not in private},
        parameters=sum(parameter.numel() for parameter in run.vje.parameters()),
        family=get_family(settings.score_likelihood or config.likelihood),
        score=settings,
        meaning=judge.score.description,
        calibration=judge.calibration.describe() if judge.calibration else None,
        evaluation=None if evaluation is None else format_table(evaluation),
        scored=scored,
        **file,
        differences={name: f"{value:.1e}" for name, value in differences.items()},
        trained=(written or {}).get("versions"),
        exported=versions(),
        margin=MARGIN,
    )
