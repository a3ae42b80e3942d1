"""The default corpus, made from the standard library of the running Python: no download.

Its text is what `help()` shows (docstrings after their signatures, or else the comment above a definition, and the help
topics), the other comments, and the messages. The library's `.py` files are parsed, not imported, so one version of
Python gives the same bytes on every machine. On Python 3.10 and 3.11 this text is some thousand words short of the
minimum, so the docstrings of the modules that are part of every CPython interpreter are added.
"""

import ast
import hashlib
import importlib
import re
import sys
import sysconfig
import tokenize
import types
from collections.abc import Callable, Iterator
from pathlib import Path

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import atomic_write

from .corpora import SPLITS

MINIMUM_WORDS = 400_000

# Modules, packages and folders that distributions leave out, move or patch (Debian's were compared with the original),
# that only one platform has, or that are tests or generated tables.
EXCLUDED = frozenset(
    "_opcode_metadata ctypes.macholib ctypes.util dbm.gnu dbm.ndbm distutils encodings ensurepip gettext html.entities "
    "idlelib lib2to3 pydoc pydoc_data re._casefix site stringprep sysconfig test tkinter token turtledemo venv".split()
)
# Compiled into every CPython interpreter, with the same docstrings on every platform.
BUILT_IN = "_collections _functools _io _operator _tracemalloc atexit builtins gc itertools marshal".split()

# These packages and help topics are always in the training text: the largest packages, one of which could be half of a
# held-out set, and packages with similar text. The hash of their names would put them elsewhere.
TRAINED = frozenset(
    "_compression asyncio builtins genericpath gzip importlib pdb posixpath queue selectors smtplib tarfile unittest "
    "help:compound".split()
)
# These share text with another one and go to its split (_x goes with x, too).
SAME_AS = {"chunk": "aifc", "sunau": "aifc", "wave": "aifc", "help:continue": "help:break", "help:return": "help:break"}
# This share of the other packages goes to each of valid and test. The salt is the first number from 0 with which each
# of them gets 4.6 to 5.4 % of all words on Python 3.10 to 3.13.
HELD_OUT, SALT = 0.105, 170

# Python's lexical rule: a string or a comment, whichever begins first, hides the other. This finds exactly the comments
# that `tokenize` finds, in a fraction of the time.
STRING_OR_COMMENT = re.compile(
    r'"""(?:\\.|[^\\])*?"""|"(?:\\.|[^"\\\n])*"'
    r"|'''(?:\\.|[^\\])*?'''|'(?:\\.|[^'\\\n])*'|#(?P<comment>[^\n]*)",
    re.DOTALL,
)

TYPOGRAPHY = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})

# Lines that begin a paragraph: "- text", "2. text", ":return: text" without the mark; "name -- text", "name(x): text".
ITEM = re.compile(r"(?:[-*+o•]|\(?(?:\d{1,2}|[a-z])[.)]|[:@]\w+:?) +(?=\S)")
ENTRY = re.compile(r"[\w*.]+(?:\([^()]*\))?(?: +--?|:) +\S")

# Lines that are not prose. A call or signature alone on its line is left out before the indented text under it, if any.
SIGNATURE = re.compile(r"[\w.]+\((?:[^()]|\([^()]*\))*\)(?: ?->[^.]+)?[:,;]?(?: *#.*)?$")
PROMPT = re.compile(r">>>|\.\.\.(?: |$)|[$%] |\(Pdb\)")
CODE = re.compile(
    r"@\w[\w.]*(?:\(.*)?$|(?:async )?(?:def|class) \w+ ?[(:]"
    r"|import [\w.]+(?:, [\w.]+)*(?: as \w+)?$|from [\w.]+ import "
    r"|(?:async )?(?:for .+ in \S+|with \S+(?:\(.*\))?(?: as \w+)?|(?:if|elif|while)(?: not)? \S+(?: \S{1,3} \S+)*):"
    r"|(?:else|try|finally|except(?: \S+)?(?: as \w+)?):"
    r"|(?:return|raise|del|assert|print|await)(?:$|\(| [\w.]+(?:$|[(\[])| [fr]?[\"'])"
    r"|[\w.]+(?:\[.*?\])?(?:, ?[\w.]+)* +(?:[-+*/|&:]|::?)?= *\S|\S+=\S+$"  # an assignment, a rule of a grammar
    r"|<.*>$|\\|.*\(\?[P:<=!]"  # mark-up, a regular expression
)
SEPARATOR = re.compile(r"[^A-Za-z]*$")
TABLE = re.compile(r".*\S {3,}\S.*\S {3,}\S|.*\|.*\|.*\|")
TOOL = re.compile(r".*(?:-\*-|\bpragma:)|!|\.\. [\w-]+::", re.I)
NO_PROSE = (SIGNATURE, CODE, SEPARATOR, TABLE, TOOL)
# Paragraphs that are not prose, and the form of words.
LICENCE = re.compile(
    r"(?i)copyright|all rights reserved|licen[cs]ed? (?:to|under)|warranty of|redistribut|\bliable\b|\bdisclaim"
)
WORD = re.compile(r"""[("'`*]*[A-Za-z]+(?:['/-][A-Za-z]+)*[)"'`*]*[.,;:!?]*[)"'`*]*$""")
NAME = re.compile(r"""["'(]*(?:\w+(?:\.\w+)*(?:\(\))?|%[a-z\d.]+|%\(\w+\)[a-z]|\{[\w.!:]*\})["')]*[.,;:!?]*$""")

MARKUP = (
    (re.compile(r":(?:\w+:)?\w+:`~?([^`]*)`"), r"\1"),  # :class:`name`
    (re.compile(r"``?([^`']+)(?:''?|``?)"), r"\1"),  # ``name``, `name`, `name'
    (re.compile(r"(?<![\w*])\*{1,2}(?=\w)([^*]*[\w.:])\*{1,2}(?![\w*])"), r"\1"),  # *word*, **word**
    (re.compile(r"[-=#*~_+<>]{4,}"), " "),  # what is left of a separator
    (re.compile(r"(?<=\w)-\n(?=[a-z])"), "-"),  # a line that ends in the middle of built-in
)


def write_embedded_corpus(folder: Path, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Path]:
    """Write train.txt, valid.txt and test.txt to `folder`, one paragraph per line, and return their paths by split.

    `on_progress(done, count)` is called after each source file. A text file appears whole or not at all. Raises
    `UserError` if the library's source is missing, or gives fewer than `MINIMUM_WORDS` words.
    """
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for module, paragraphs in _paragraphs_by_module(on_progress or (lambda done, count: None)):
        for paragraph in paragraphs:
            if paragraph not in seen:  # so no paragraph is in two splits
                seen.add(paragraph)
                lines[split_of(module)].append(paragraph)
    words = sum(len(paragraph.split()) for paragraph in seen)
    if words < MINIMUM_WORDS:
        raise UserError(
            f"Python's library gives {words} words, not {MINIMUM_WORDS}; install all of it, or give your own text"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        with atomic_write(folder / f"{split}.txt") as partial:
            partial.write_text("\n".join([*lines[split], ""]), encoding="utf-8", newline="\n")
    return {split: folder / f"{split}.txt" for split in SPLITS}


def split_of(module: str) -> str:
    """Return the split of a module ("email.header") or help topic ("help:with"), which depends on its name alone."""
    package = module.partition(".")[0]
    family = SAME_AS.get(package, package.lstrip("_"))
    place = int(hashlib.sha256(f"{SALT} {family}".encode()).hexdigest()[:8], 16) / 16**8
    if package in TRAINED or place >= 2 * HELD_OUT:
        return "train"
    return "valid" if place < HELD_OUT else "test"


def paragraphs_of_source(text: str) -> list[str]:
    """Return the paragraphs of a Python file in its order."""
    pieces, undocumented = _strings(ast.parse(text))
    for line, column, contents in _comments(text):
        heading = undocumented.get((line + len(contents), column), "")
        pieces.append((line, column, heading, "\n".join(contents)))
    return [paragraph for _, _, heading, piece in sorted(pieces) for paragraph in paragraphs_of_text(piece, heading)]


def paragraphs_of_text(text: str, heading: str = "") -> list[str]:
    """Return the paragraphs of prose in a text, each on one line, in ASCII, the first after the `heading`."""
    kept = []
    for paragraph in map("\n".join, _blocks(text)):
        for pattern, plain in MARKUP:
            paragraph = pattern.sub(plain, paragraph)
        if reads_as_prose(paragraph):
            kept.append(f"{heading}: {paragraph}" if heading and not kept else paragraph)
    return [" ".join(words) for words in map(str.split, kept) if len(words) >= 3 and "".join(words).isascii()]


def reads_as_prose(paragraph: str) -> bool:
    """Return whether a paragraph consists mostly of words and is not a licence. Names and placeholders hardly count."""
    words = paragraph.split()
    others = [word for word in words if not WORD.match(word)]
    plain, strange = len(words) - len(others), sum(not NAME.match(word) for word in others)
    mostly_words = plain >= 2 and plain >= 0.4 * len(words) and plain >= 1.5 * strange
    return mostly_words and not LICENCE.search(paragraph)


def _blocks(text: str) -> Iterator[list[str]]:
    """Yield the lines of each paragraph. Lines that are not prose end a paragraph, as empty lines do."""
    block: list[str] = []
    signatures: list[str] = []
    in_example, literal_below, signature_column, last_column = False, sys.maxsize, 0, 0
    for line in [*text.translate(TYPOGRAPHY).expandtabs().split("\n"), ""]:
        content, column = line.strip(), len(line) - len(line.lstrip())
        if content and column <= literal_below:
            literal_below = sys.maxsize
        in_example = bool(content) and (in_example or PROMPT.match(content) is not None)  # to the next empty line
        if in_example or column > literal_below:
            content = ""
        elif SIGNATURE.match(content):
            signatures = [*signatures, content] if column == signature_column and not block else [content]
            signature_column = column
        if any(pattern.match(content) for pattern in NO_PROSE):
            content = ""
        item = ITEM.match(content)
        # A dedent ends an item; but the first line of a paragraph may be indented, too.
        dedent = len(block) > 1 and column < last_column
        if block and (not content or item or dedent or ENTRY.match(content)):
            yield block
            block = []
        last_column = column
        if not content:
            continue
        if signatures and not block and column > signature_column:
            block = [" ".join(signatures).rstrip(":,;") + ":"]
        signatures = []
        if content.endswith("::"):  # reStructuredText: text with deeper indentation is not prose
            content, literal_below = content[:-1], column
        block.append(content[item.end() :] if item else content)


def _comments(text: str) -> list[tuple[int, int, list[str]]]:
    """Return line, column and lines of each comment. Comment-only lines under each other are one comment."""
    comments: list[tuple[int, int, list[str]]] = []
    line, line_start = 1, 0
    for match in STRING_OR_COMMENT.finditer(text):
        if match["comment"] is not None:
            line += text.count("\n", line_start, match.start())
            line_start = text.rfind("\n", 0, match.start()) + 1
            column, alone = match.start() - line_start, not text[line_start : match.start()].strip()
            if not (alone and comments and (line - len(comments[-1][2]), column) == comments[-1][:2]):
                comments.append((line, column, []))
            comments[-1][2].append(match["comment"].lstrip("#"))
    return comments


def _strings(tree: ast.Module) -> tuple[list[tuple[int, int, str, str]], dict[tuple[int, int], str]]:
    """Return line, column, heading and text of each string, and the headings of undocumented definitions by place."""
    pieces, undocumented = [], {}
    todo: list[tuple[ast.AST, str, str]] = [(tree, "", "")]  # node, prefix of the names in it, heading of its string
    while todo:
        node, prefix, heading = todo.pop()
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.JoinedStr):
            values = [v.value if isinstance(v, ast.Constant) else f"{{{ast.unparse(v.value)}}}" for v in node.values]
            pieces.append((node.lineno, node.col_offset, heading, "".join(values)))
            children = []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            pieces.append((node.lineno, node.col_offset, heading, node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
            children, heading = node.args, node.func.id  # the message, as a traceback shows it
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            title, heading = _heading(node, prefix), ""
            if docstring := ast.get_docstring(node):
                pieces.append((node.body[0].lineno, node.body[0].col_offset, title, docstring))
                children.remove(node.body[0])
            elif not isinstance(node, ast.Module):
                first_line = min(part.lineno for part in (node, *node.decorator_list))
                undocumented[first_line, node.col_offset] = title
            prefix = f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else ""
        # The message is the first child of "..." % x and, inside, of "...".format(x).
        nodes = (child for child in children if not isinstance(child, ast.Name | ast.expr_context))
        todo += [(child, prefix, "" if place else heading) for place, child in enumerate(nodes)]
    return pieces, undocumented


def _heading(node: ast.AST, prefix: str) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {prefix}{node.name}({', '.join(map(ast.unparse, node.bases))})".removesuffix("()")
    return "" if isinstance(node, ast.Module) else f"{prefix}{node.name}({ast.unparse(node.args)})"


def _paragraphs_by_module(on_progress: Callable[[int, int], None]) -> Iterator[tuple[str, list[str]]]:
    library = Path(sysconfig.get_path("stdlib"))
    topics = library / "pydoc_data" / "topics.py"
    if not topics.is_file():
        raise UserError(
            f"the source of Python's library is not in {library}; use a Python that has its .py files, or your own text"
        )
    files = source_files(library)
    for done, (module, path) in enumerate(files.items(), start=1):
        with tokenize.open(path) as file:
            yield module, paragraphs_of_source(file.read())
        on_progress(done, len(files))
    [dictionary] = [node.value for node in ast.parse(topics.read_bytes()).body if isinstance(node, ast.Assign)]
    for topic, text in sorted(ast.literal_eval(dictionary).items()):
        yield f"help:{topic}", paragraphs_of_text(text)
    for module in BUILT_IN:
        yield module, _paragraphs_of_built_in(module)


def source_files(library: Path) -> dict[str, Path]:
    """Return the path of each module to read, in the order of module names."""
    files = {}
    for name in sys.stdlib_module_names:  # the same on every platform
        for path in (library / f"{name}.py", *(library / name).rglob("*.py")):
            parts = path.relative_to(library).with_suffix("").parts
            prefixes = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
            if path.is_file() and EXCLUDED.isdisjoint((*parts, *prefixes)):
                files[".".join(parts).removesuffix(".__init__")] = path
    return dict(sorted(files.items()))


def _paragraphs_of_built_in(module: str) -> list[str]:
    paragraphs = []
    for name, thing in sorted(vars(importlib.import_module(module)).items()):
        if isinstance(thing, type | types.BuiltinFunctionType):
            members = sorted(vars(thing).items()) if isinstance(thing, type) else []
            for label, item in [(name, thing), *((f"{name}.{member}", item) for member, item in members)]:
                if item.__doc__ and not re.search(r"\b_", label):  # every type has its __eq__
                    signature = re.sub(r"\$(?:module,? ?)?", "", getattr(item, "__text_signature__", None) or "")
                    paragraphs += paragraphs_of_text(item.__doc__, label + signature)
    return paragraphs
