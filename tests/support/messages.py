"""Every message that the code can raise, read from its source: the constant parts, in order, with gaps between."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
# Exceptions whose text is for Ray, the web server or the engine itself: it is turned into another for people.
INNER = {
    "_GarbledError", "_TakenError", "EngineDiedError", "FileNotFoundError", "IndexError", "RuntimeError", "SystemExit",
}  # fmt: skip


_PRINTED = "error: "
_MAKES_ONE = re.compile(r"(Error|Exception|Refusal|Rejection)$|^(fail|failure|status_answer)$")


class Message(NamedTuple):
    """Where a message is made, and its constant parts."""

    where: str
    parts: tuple[str, ...]

    @property
    def shown(self):
        """As people see it, with … for what differs."""
        return "…".join(self.parts)


def messages():
    """All of them, each text once."""
    paths = [
        path for folder in ("pipelines", "diffusion_core", "infra") for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    trees = {path: ast.parse(path.read_text()) for path in [*paths, ROOT / "flows.py"]}
    functions = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.setdefault(node.name, []).append(node)
    found = {}
    for path, tree in trees.items():
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]:
            for line, text in _raised(function, functions):
                message = Message(f"{path.relative_to(ROOT)}:{line}", text)
                # The names of fields stand before a message: they are none.
                if re.fullmatch(r"[a-z_]+(, [a-z_]+)*", message.shown):
                    continue
                if " " in message.shown and re.search(r"[A-Za-z]{4,}|[A-Za-z]+ [A-Z]{3}", message.shown):
                    found.setdefault(text, message)
    return list(found.values())


def _raised(function, functions):
    """(line, parts) of the texts of exceptions that a function makes, and of errors that it prints itself."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and _is_error(node.func):
            for argument in node.args:
                for text in _texts(argument, function, functions, 0):
                    yield node.lineno, text
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            for text in _texts(node.args[0], function, {}, 0) if node.args else ():
                if text[0].startswith(_PRINTED):
                    yield node.lineno, (text[0].removeprefix(_PRINTED), *text[1:])


def _is_error(called):
    name = getattr(called, "id", getattr(called, "attr", ""))
    return name not in INNER and bool(_MAKES_ONE.search(name))


def _texts(node, function, functions, depth):
    """The texts that an expression may be: literals, names given in the function, what a function of ours returns."""
    match node:
        case ast.Constant(value=str(value)):
            yield (value,)
        case ast.JoinedStr(values=values):
            yield tuple(_merged([part.value if isinstance(part, ast.Constant) else None for part in values]))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            for one in _texts(left, function, functions, depth):
                yield (*one, "") if not list(_texts(right, function, functions, depth)) else one
        case ast.IfExp(body=body, orelse=other):
            yield from _texts(body, function, functions, depth)
            yield from _texts(other, function, functions, depth)
        case ast.Name(id=name):
            for made in ast.walk(function):
                targets = made.targets if isinstance(made, ast.Assign) else [getattr(made, "target", None)]
                value = getattr(made, "value", None)
                if any(getattr(each, "id", "") == name for each in targets) and not isinstance(value, ast.Name | None):
                    yield from _texts(value, function, functions, depth)
        case ast.Call(func=called) if depth < 2:
            for other in functions.get(getattr(called, "id", getattr(called, "attr", "")), []):
                for returned in ast.walk(other):
                    if isinstance(returned, ast.Return) and returned.value is not None:
                        yield from _texts(returned.value, other, functions, depth + 1)


def _merged(parts):
    """Constants with gaps between: "" at either end where a gap stands there."""
    texts = [""]
    for part in parts:
        if part is None:
            texts.append("")
        else:
            texts[-1] += part
    return texts
