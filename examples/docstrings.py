"""The docstrings of the Python standard library, as text that every machine has.

The sources are parsed, not imported. Which docstrings there are depends a little on the Python
version.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from typing import Any

# Modules that Python 3.11 and later have and that are plain source files.
# fmt: off
MODULES = (
    "argparse", "ast", "asyncio.base_events", "asyncio.events", "asyncio.locks", "asyncio.queues",
    "asyncio.streams", "asyncio.tasks", "base64", "bdb", "bisect", "bz2", "calendar", "cmd", "code",
    "collections", "concurrent.futures._base", "configparser", "contextlib", "copy", "csv",
    "dataclasses", "datetime", "difflib", "dis", "doctest", "email.charset", "email.header",
    "email.message", "enum", "filecmp", "fileinput", "fractions", "ftplib", "functools", "gettext",
    "graphlib", "gzip", "heapq", "hmac", "html.parser", "http.client", "http.cookiejar",
    "http.server", "imaplib", "importlib.metadata", "inspect", "ipaddress", "json", "json.encoder",
    "linecache", "locale", "logging", "logging.config", "logging.handlers", "lzma", "mailbox",
    "mimetypes", "multiprocessing.managers", "multiprocessing.pool", "numbers", "optparse",
    "pathlib", "pdb", "pickle", "pickletools", "pkgutil", "platform", "plistlib", "poplib",
    "pprint", "pydoc", "queue", "random", "rlcompleter", "sched", "secrets", "selectors", "shelve",
    "shlex", "shutil", "smtplib", "socket", "socketserver", "ssl", "statistics", "string",
    "subprocess", "symtable", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize",
    "traceback", "types", "typing", "unittest.case", "unittest.loader", "unittest.mock",
    "unittest.suite", "urllib.parse", "urllib.request", "uuid", "venv", "wave", "weakref",
    "webbrowser", "xml.dom.minidom", "xml.sax.handler", "xmlrpc.client", "zipfile",
)
# fmt: on


def docstrings(module: str) -> Iterator[str]:
    """Yield the docstring of every function and class in a module's source, without indentation."""
    spec = importlib.util.find_spec(module)
    loader: Any = spec.loader if spec else None
    source = loader.get_source(module) if hasattr(loader, "get_source") else None
    if source is None:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield inspect.cleandoc(ast.get_docstring(node) or "")


def paragraphs(module: str) -> Iterator[list[str]]:
    """Yield the paragraphs of every docstring of a module, each on one line."""
    for text in docstrings(module):
        yield [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
