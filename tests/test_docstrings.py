"""What the docstrings of public names must say: exceptions, shapes of tensors, parameters, sources.

That every public name has one, and its form, is checked by ruff (rules D). Here the source is read, not imported.
"""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_vje"
API = (
    "__init__",
    "ablation",
    "config",
    "encoders",
    "evaluation",
    "likelihoods",
    "model",
    "objective",
    "runs",
)
API += ("scoring", "training", "distributions")
"""Modules whose parameters are all described: what `pyro_vje` itself exports."""
SHAPE = re.compile(r"\([^()]*(?:\b[A-Z]\b|\.\.\.)[^()]*\)|shape|scalar|stack_views|as in")


def public(tree, prefix="", inherited=""):
    """(name, node, docstring with that of its class) of public functions and methods, and ``__init__``."""
    for node in tree.body:
        own = "" if not isinstance(node, ast.ClassDef | ast.FunctionDef) else ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node, f"{prefix}{node.name}.", own)
        elif isinstance(node, ast.FunctionDef) and (node.name == "__init__" or node.name[0] != "_"):
            yield prefix + node.name, node, own + "\n" + inherited


def functions(modules=None):
    """A test parameter for each public function of the package, or of the named modules."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if (path.stem[0] == "_" and path.stem != "__init__") or (modules and parts[0] not in modules):
            continue
        for name, node, text in public(ast.parse(path.read_text())):
            yield pytest.param(node, text, id=f"{'.'.join(parts)}.{name}")


def raised(node):
    """Names of the exceptions that a function raises itself, and not for itself to catch."""
    for part in ast.walk(node):
        if (
            isinstance(part, ast.Raise)
            and isinstance(part.exc, ast.Call)
            and isinstance(part.exc.func, ast.Name)
        ):
            yield part.exc.func.id


def arguments(node):
    """Arguments of a function but for ``self`` and what Pyro or Python passes by itself."""
    own = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [arg for arg in own if arg.arg not in ("self", "cls", "validate_args", "_instance")]


@pytest.mark.parametrize(("node", "text"), list(functions()))
def test_exceptions_are_named(node, text):
    missing = sorted(
        {
            name
            for name in raised(node)
            if name not in text and name not in ("AttributeError", "KeyboardInterrupt")
        }
    )
    assert not missing or "aises as" in text, f"line {node.lineno}: when does it raise {', '.join(missing)}?"


@pytest.mark.parametrize(("node", "text"), list(functions(API)))
def test_shapes_are_said(node, text):
    tensors = [
        arg.arg
        for arg in arguments(node)
        if arg.annotation is not None and re.search(r"\bTensor\b", ast.unparse(arg.annotation))
    ]
    family = any(
        "register" in ast.unparse(decorator) for decorator in node.decorator_list
    )  # described once, above them
    assert not tensors or family or SHAPE.search(text), (
        f"line {node.lineno}: what shape have {', '.join(tensors)}?"
    )


@pytest.mark.parametrize(("node", "text"), list(functions(API)))
def test_parameters_are_described(node, text):
    # One sentence may describe few parameters; where there is a section, it describes every one.
    own = text if node.name == "__init__" else ast.get_docstring(node) or ""
    if "Parameters\n---" in own:
        missing = [arg.arg for arg in arguments(node) if not re.search(rf"\b{arg.arg}\b", own)]
        assert not missing, f"line {node.lineno}: not described: {', '.join(missing)}"


def test_sources_of_distributions_are_named():
    for path in sorted((PACKAGE / "distributions").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name[0] != "_" and path.stem[0] != "_":
                text = ast.get_docstring(node)
                assert re.search(r"[Ss]ource|[Oo]urs|Pyro's|\(\w+, \d{4}\)", text), f"{path.stem}.{node.name}"


def test_this_test_sees_what_it_should():
    ids = {parameter.id for parameter in functions()}
    assert {"model.VJE.__init__", "distributions.polar.PolarStudentT.sample", "scoring.score"} <= ids
    node = ast.parse("def f(x: Tensor):\n    'Short.'\n    raise OSError('x')").body[0]
    assert list(raised(node)) == ["OSError"]
    assert not SHAPE.search("Short.")
