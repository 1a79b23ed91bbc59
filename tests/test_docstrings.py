"""What the docstrings of the public API must say: exceptions, shapes of tensors, parameters, sources.

The API is what `pyro_vje` exports, the distributions and the likelihoods. That every public name of the package has
a docstring, and its form, is checked by ruff (rules D).
"""

import ast
import inspect
import re

import pyro_vje
from pyro_vje import distributions, likelihoods

SHAPE = re.compile(r"\([^()]*(?:\b[A-Z]\b|\.\.\.)[^()]*\)|shape|scalar|stack_views|as in")
NOT_SAID = ("AttributeError", "KeyboardInterrupt")


def public(tree, prefix="", inherited=""):
    """(name, node, docstring with that of its class) of public functions and methods, and ``__init__``."""
    for node in tree.body:
        own = "" if not isinstance(node, ast.ClassDef | ast.FunctionDef) else ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node, f"{prefix}{node.name}.", own)
        elif isinstance(node, ast.FunctionDef) and (node.name == "__init__" or node.name[0] != "_"):
            yield prefix + node.name, node, own + "\n" + inherited


def exported(module):
    """(name, parsed source) of the classes and functions that a module exports."""
    for name in module.__all__:
        thing = getattr(module, name)
        if not inspect.ismodule(thing):
            yield name, ast.parse(inspect.getsource(thing))


def api():
    """(name, node, text) of each function and method of the public API."""
    for _, tree in (*exported(pyro_vje), *exported(distributions)):
        yield from public(tree)
    yield from public(ast.parse(inspect.getsource(likelihoods)))


def raised(node):
    """Names of the exceptions that a function raises itself, and not for itself to catch."""
    for part in ast.walk(node):
        if isinstance(part, ast.Raise) and isinstance(part.exc, ast.Call) and isinstance(part.exc.func, ast.Name):
            yield part.exc.func.id


def arguments(node):
    """Arguments of a function but for ``self`` and what Pyro or Python passes by itself."""
    own = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [arg for arg in own if arg.arg not in ("self", "cls", "validate_args", "_instance")]


def unsaid_exceptions(node, text):
    """Exceptions that the docstring does not name."""
    return [] if "aises as" in text else sorted({*raised(node)} - {*NOT_SAID, *re.findall(r"\w+", text)})


def shapeless(node, text):
    """Tensors among the arguments, where the docstring says no shape."""
    if any("register" in ast.unparse(decorator) for decorator in node.decorator_list):
        return []  # a family: described once, above them
    kinds = {arg.arg: ast.unparse(arg.annotation) for arg in arguments(node) if arg.annotation is not None}
    return [] if SHAPE.search(text) else [arg for arg, kind in kinds.items() if re.search(r"\bTensor\b", kind)]


def undescribed(node, text):
    """Arguments that a section on the parameters leaves out; one sentence may describe few without a section."""
    own = text if node.name == "__init__" else ast.get_docstring(node) or ""
    if "Parameters\n---" not in own:
        return []
    return [arg.arg for arg in arguments(node) if not re.search(rf"\b{arg.arg}\b", own)]


def found(rule):
    return {name: missing for name, node, text in api() if (missing := rule(node, text))}


def test_exceptions_are_named():
    assert found(unsaid_exceptions) == {}


def test_shapes_are_said():
    assert found(shapeless) == {}


def test_parameters_are_described():
    assert found(undescribed) == {}


def test_sources_of_distributions_are_named():
    unsourced = [
        name
        for name, tree in exported(distributions)
        if isinstance(tree.body[0], ast.ClassDef)
        and not re.search(r"[Ss]ource|[Oo]urs|Pyro's|\(\w+, \d{4}\)", ast.get_docstring(tree.body[0]) or "")
    ]
    assert unsourced == []


def test_these_tests_see_what_they_should():
    names = {name for name, *_ in api()}
    assert {"VJE.__init__", "SymmetricELBO.differentiable_loss", "PolarStudentT.sample", "register", "score"} <= names
    node = ast.parse("def f(x: Tensor, y):\n    'Short.\\n\\nParameters\\n---\\nx'\n    raise OSError('x')").body[0]
    text = ast.get_docstring(node)
    assert (unsaid_exceptions(node, text), shapeless(node, text), undescribed(node, text)) == (
        ["OSError"],
        ["x"],
        ["y"],
    )
