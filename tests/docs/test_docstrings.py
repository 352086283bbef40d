"""Every docstring begins with a verb or "The"; every public name has one, which names the errors it raises itself."""

import ast
import importlib
import inspect
import textwrap
from pathlib import Path

from test_public_names import NAMES, PATHS

import textpolicy
from textpolicy import errors

ROOT = Path(textpolicy.__file__).parent
# Docstrings begin with one of these, in the imperative. Add a new verb here; reword an opening that is no verb.
VERBS = [
    "Add", "Adjust", "Admit", "Answer", "Append", "Apply", "Ask", "Attach", "Average", "Become", "Begin", "Break",
    "Bring", "Browse", "Build", "Call", "Carry", "Change", "Check", "Choose", "Clip", "Close", "Collect", "Compare",
    "Compute", "Convert", "Copy", "Count", "Decide", "Delete", "Describe", "Divide", "Do", "Draw", "Drop", "End",
    "Enumerate", "Estimate", "Evaluate", "Export", "Fail", "Fill", "Find", "Fingerprint", "Finish", "Fit", "Flatten",
    "Flip", "Follow", "Force", "Forget", "Free", "Freeze", "Generate", "Give", "Grade", "Group", "Hand", "Handle",
    "Hold", "Import", "Index", "Inspect", "Join", "Keep", "Kill", "Lay", "Learn", "Let", "Limit", "Link", "List",
    "Load", "Lock", "Log", "Make", "Mark", "Maximise", "Measure", "Merge", "Mine", "Move", "Name", "Normalise", "Note",
    "Observe", "Open", "Pack", "Parse", "Pass", "Pickle", "Plan", "Play", "Pool", "Predict", "Prepare", "Print", "Put",
    "Quantise", "Queue", "Raise", "Reach", "Read", "Reassign", "Rebuild", "Receive", "Record", "Redirect", "Reduce",
    "Register", "Release", "Remove", "Rename", "Render", "Replace", "Report", "Resample", "Restore", "Resume", "Return",
    "Run", "Sample", "Save", "Say", "Scale", "Score", "Seed", "Select", "Send", "Serve", "Set", "Shape", "Share",
    "Show", "Simulate", "Smooth", "Start", "Stop", "Sum", "Summarize", "Switch", "Sync", "Take", "Test", "Tokenise",
    "Track", "Train", "Translate", "Try", "Turn", "Undo", "Update", "Use", "Wait", "Weigh", "Whiten", "Work", "Wrap",
    "Write", "Yield",
]  # fmt: skip
OPENINGS = {"The", *VERBS}
RAISED = {name for name, value in vars(errors).items() if inspect.isclass(value)} | {"unknown_name"}


def packages_with_a_list():
    """Modules whose ``__all__`` says what is public."""
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


LISTED = [*packages_with_a_list()]
PUBLIC = sorted(
    {("textpolicy", name) for name in NAMES}
    | {(path, name) for path, names in PATHS.items() for name in names}
    | {(module, name) for module in LISTED for name in importlib.import_module(module).__all__}
)


def thing(path, name):
    return getattr(importlib.import_module(path), name)


def documented(path, name):
    """Whether it is a class or function of ours: modules, constants and aliases have no docstring of their own."""
    value = thing(path, name)
    return (inspect.isclass(value) or inspect.isroutine(value)) and value.__module__.startswith("textpolicy")


OURS = [pair for pair in PUBLIC if documented(*pair)]


def test_the_packages_with_a_list_are_seen():
    assert {"textpolicy", "textpolicy.rewards", "textpolicy.environment"} <= {*LISTED}
    assert len(OURS) > 150


def docstrings():
    """Yield (place, docstring) of every module, class and function, private ones included, that has a docstring."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None:
                    yield f"{path.relative_to(ROOT.parent)}:{getattr(node, 'lineno', 1)}", text


def test_every_docstring_begins_with_a_verb_or_the():
    found = list(docstrings())
    assert len(found) > 1000
    others = [(where, text.splitlines()[0]) for where, text in found if text.split()[0].rstrip(",;:") not in OPENINGS]
    assert others == []


def test_the_verbs_are_sorted():
    assert sorted({*VERBS}) == VERBS


def test_every_module_of_the_package_has_a_docstring():
    bare = [path for path in ROOT.rglob("*.py") if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert bare == []


def test_every_public_name_has_a_docstring():
    for path, name in OURS:
        value = thing(path, name)
        own = (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or ""
        assert len(own.split()) >= 3, f"{path}.{name}"
        assert not own.startswith(f"{name}("), f"{path}.{name}"  # the signature that dataclasses put there


def methods(path, name):
    value = thing(path, name)
    found = [("", value)] if inspect.isroutine(value) else []
    if inspect.isclass(value):
        found = [(f".{n}", m) for n, m in vars(value).items() if inspect.isfunction(m) and not n.startswith("_")]
    return [(f"{path}.{name}{suffix}", inspect.unwrap(f)) for suffix, f in found]


def raises(function):
    """Whether a ``raise`` of one of our errors stands in its body."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):
        return False
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    names = {n.id for exc in raised for n in ast.walk(exc) if isinstance(n, ast.Name)}
    return bool(names & RAISED)


def test_every_public_function_that_raises_names_its_errors():
    raising = [pair for path, name in OURS for pair in methods(path, name) if raises(pair[1])]
    assert len(raising) > 50
    for where, function in raising:
        text = (function.__doc__ or "").lower()
        assert any(word in text for word in ("raise", "error", "refuse")), where
