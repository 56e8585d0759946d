import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.base.errors import BadInput
from pipeline.code.digest import CodeIndex, missing_target
from pipeline.code.normal_form import Import, ModuleSyntax
from pipeline.code.syntax import read_source

FIXTURE = Path(__file__).parent / "fixtures" / "syntax.txt"
# Equal on Python 3.11 to 3.14; a change of it reruns everybody's pipelines.
FIXTURE_DIGEST = "79f4c030e19433230243d4e14626c64a83532f69b9054072d30983193ae0620e"


def source_of(tmp_path: Path, text: str) -> ModuleSyntax:
    file = tmp_path / "module.py"
    file.unlink(missing_ok=True)
    file.write_text(textwrap.dedent(text), encoding="utf-8")
    return read_source(file, "pkg.module", False)


def digest(tmp_path: Path, text: str) -> str:
    return source_of(tmp_path, text).digest


BASE = """
    import os
    def f(x, y=1):
        if x:
            y = x + 2
        return y
    class C:
        z: int = 1
"""


@pytest.mark.parametrize(
    "text",
    [
        # comments, blank lines, layout
        """
        import os  # a comment

        def f( x,
               y = 1 ):
            if (x): y = (x + 2)

            return y
        class C:
            z: int = 1
        """,
        # docstrings, bare strings, pass
        """
        "module"
        import os
        def f(x, y=1):
            "function"
            if x:
                y = x + 2
                pass
            return y
        class C:
            "class"
            z: int = 1
            "what z is"
        """,
        # annotations and what serves them alone
        """
        import typing
        from typing import TYPE_CHECKING, Any
        from collections.abc import Sequence
        import os
        if TYPE_CHECKING:
            import heavy
        def f(x: 'Sequence[heavy.Thing]', y: int = 1) -> Any:
            local: int
            if x:
                y: int = x + 2
            return y
        class C:
            z: int = 1
        """,
    ],
)
def test_what_has_no_effect_leaves_the_digest(tmp_path: Path, text: str) -> None:
    assert digest(tmp_path, text) == digest(tmp_path, BASE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("y=1", "y=2"),
        ("y=1", "y=1.0"),
        ("y=1", "y=True"),
        ("x + 2", "x - 2"),
        ("x + 2", "x + '2'"),
        ("return y", "return x"),
        ("return y", "return"),
        ("import os", "import os as o"),
        ("z: int = 1", "z = 1"),  # no longer a field of a dataclass
        ("z: int = 1", "z: int"),
        ("if x", "while x"),
        ("def f", "async def f"),
    ],
)
def test_what_has_an_effect_changes_the_digest(tmp_path: Path, old: str, new: str) -> None:
    assert digest(tmp_path, BASE.replace(old, new)) != digest(tmp_path, BASE)


# ------------------------------------------------- what a program can read when it runs

DISPATCH = """
    from functools import singledispatch
    from typing import Any
    @singledispatch
    def kind(x: Any, *more: int, key: int = 1) -> str:
        return "any"
    @kind.register
    def of_int(x: int):
        return "int"
"""
MODEL = """
    from __future__ import annotations
    from typing import Any, ClassVar, Optional
    class Model:
        a: int = 1
        b: "ClassVar[int]"
        if True:
            c: Optional[int]
        @property
        def d(self) -> int: ...
        def plain(self, x: Any): ...
"""
READS = """
    def f():
        "one"
        return f.__doc__
    class C:
        "two"
"""


def kind_of_one(text: str) -> str:
    """Run `DISPATCH`, or what became of it."""
    names: dict[str, Any] = {}
    exec(textwrap.dedent(text), names)  # noqa: S102 - it stands above
    found: str = names["kind"](1)
    return found


@pytest.mark.parametrize(
    ("base", "old", "new"),
    [
        (DISPATCH, "x: int", "x: float"),
        (DISPATCH, "*more: int", "*more: float"),
        (DISPATCH, "key: int", "key: float"),
        (DISPATCH, "-> str", "-> bytes"),
        (DISPATCH, "x: Any", "x: 'Any'"),
        (DISPATCH, "from typing", "from typing_extensions"),
        (MODEL, "a: int", "a: float"),
        (MODEL, "a: int", "(a): int"),  # no field
        (MODEL, "ClassVar[int]", "ClassVar[float]"),
        (MODEL, "c: Optional[int]", "c: int"),
        (MODEL, "d(self) -> int", "d(self) -> float"),
        (MODEL, "typing import Any, ClassVar", "typing_extensions import Any, ClassVar"),
        (MODEL, "from __future__ import annotations", ""),
        (READS, '"one"', '"1"'),
        (READS, '"two"', '"2"'),
        (READS, '"two"', "pass"),
        (READS.replace("f.__doc__", "__doc__"), '"one"', '"1"'),
        (READS.replace("f.__doc__", "getattr(f, '__doc__')"), '"one"', '"1"'),
        (READS.replace("f.__doc__", "inspect.getdoc(f)"), '"one"', '"1"'),
    ],
)
def test_what_can_be_read_at_run_time_changes_the_digest(
    tmp_path: Path, base: str, old: str, new: str
) -> None:
    assert old in base
    assert digest(tmp_path, base.replace(old, new)) != digest(tmp_path, base)


def test_a_program_that_dispatches_otherwise_has_another_digest(tmp_path: Path) -> None:
    other = DISPATCH.replace("x: int", "x: float")
    assert (kind_of_one(DISPATCH), kind_of_one(other)) == ("int", "any")
    assert digest(tmp_path, DISPATCH) != digest(tmp_path, other)


@pytest.mark.parametrize(
    ("base", "old", "new"),
    [
        (DISPATCH, "import Any", "import Any, Sequence"),  # which nothing needs
        (MODEL, "x: Any", "x: Optional[Any]"),
        (MODEL, "import Any, ", "import "),  # plain functions alone need it
        (MODEL, "class Model", "if TYPE_CHECKING:\n        import heavy\n    class Model"),
        (READS.replace(".__doc__", "()  # no __doc__"), '"one"', '"1"'),
        (READS, "def f():", "x: int\n    def f() -> str:"),
    ],
)
def test_what_nothing_reads_leaves_the_digest(
    tmp_path: Path, base: str, old: str, new: str
) -> None:
    assert old in base
    assert digest(tmp_path, base.replace(old, new)) == digest(tmp_path, base)


def test_texts_that_look_alike_are_told_apart(tmp_path: Path) -> None:
    texts = ["f('a', 'b')", "f('a' 'b')", "f('a\\', \\'b')", "f(b'ab')", "f(None)", "f('None')"]
    texts += ["f()", "f(())", "f(*a)", "f(a)", "f(a=1)", "f(**a)", "f(f'{a}')", "f(f'{a!r}')"]
    assert len({digest(tmp_path, text) for text in texts}) == len(texts)


def test_stored_digest_of_a_file_with_every_construct() -> None:
    assert read_source(FIXTURE, "pkg.module", False).digest == FIXTURE_DIGEST


def test_imports_are_found_at_any_depth_and_made_absolute(tmp_path: Path) -> None:
    source = source_of(
        tmp_path,
        """
        import a.b
        from . import sibling
        from .near import x
        from ..far import y
        def f():
            class C:
                def g(self):
                    from deep import z
        """,
    )
    assert source.imports == [
        Import("a.b"),
        Import("pkg", "sibling"),
        Import("pkg.near", "x"),
        Import("far", "y"),
        Import("deep", "z"),
    ]


# ------------------------------------------------------------------------------ the closure


@pytest.fixture
def package(toy: Path) -> Path:
    """A package `pkg` whose `__init__` re-exports from modules that it is not to pull in."""
    files = {
        "pkg/__init__.py": """
            from pkg.one import One, helper as aliased
            from pkg.inner import Deep
            from pkg.two import *
            from . import sub
            from numbers import Number
            HERE = 1
        """,
        "pkg/one.py": "import pkg.base\nclass One: pass\ndef helper(): pass",
        "pkg/two.py": "def two(): pass",
        "pkg/base.py": "x = 1",
        "pkg/sub.py": "y = 1",
        "pkg/inner/__init__.py": "from pkg.inner.deep import Deep\nfrom pkg.unused import no",
        "pkg/inner/deep.py": "class Deep: pass",
        "pkg/unused.py": "no = 1",
        "mine.py": "from helper_of_mine import f\ndef build(): pass",
        "helper_of_mine.py": "def f(): pass",
    }
    for name, text in files.items():
        (toy / name).parent.mkdir(parents=True, exist_ok=True)
        (toy / name).write_text(textwrap.dedent(text))
    return toy


@pytest.mark.parametrize(
    ("statement", "modules"),
    [
        ("from pkg import One", ["pkg.base", "pkg.one"]),
        ("from pkg import aliased", ["pkg.base", "pkg.one"]),
        ("from pkg import Deep", ["pkg.inner.deep"]),
        ("from pkg import two", ["pkg.two"]),
        ("from pkg import sub", ["pkg.sub"]),
        ("from pkg import base", ["pkg.base"]),
        ("from pkg import Number", []),
        ("from pkg.one import One", ["pkg.base", "pkg.one"]),
        ("import pkg.two", ["pkg.two"]),
        ("def f():\n    from pkg import two", ["pkg.two"]),
        ("import torch, json, pipeline.stage", []),
        ("import mine", ["helper_of_mine", "mine"]),
        ("try:\n    import pkg.absent\nexcept ImportError:\n    pass", []),
    ],
)
def test_an_import_brings_the_modules_that_define_it(
    package: Path, statement: str, modules: list[str]
) -> None:
    (package / "entry.py").write_text(statement + "\ndef main(): pass")
    assert list(CodeIndex(["pkg"]).digests(["entry:main"])) == sorted(["entry", *modules])


@pytest.mark.parametrize(
    "statement", ["import pkg", "from pkg import HERE", "from pkg import gone"]
)
def test_what_the_init_defines_itself_brings_all_of_it(package: Path, statement: str) -> None:
    (package / "entry.py").write_text(statement)
    found = CodeIndex(["pkg"]).digests(["entry:main"])
    assert {"pkg", "pkg.one", "pkg.two", "pkg.sub", "pkg.inner.deep"} < set(found)


def test_a_target_in_a_package_leads_to_the_defining_module(toy: Path) -> None:
    index = CodeIndex(["toy"], ["toy.catalogue"])
    assert list(index.digests(["toy.operations:plus"])) == ["toy.operations.plus"]
    assert list(index.digests(["toy.stages:add"])) == ["toy.common", "toy.stages"]


LAZY = """
    from typing import TYPE_CHECKING
    if TYPE_CHECKING:
        from lazy.one import One as One
        from lazy.two import two
    def __getattr__(name): ...
"""


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("from lazy import One", ["entry", "lazy.one"]),
        ("import lazy", ["entry", "lazy", "lazy.one", "lazy.two"]),
        ("import lazy.three", ["entry", "lazy.three"]),
    ],
)
def test_names_that_a_package_imports_at_first_use_bring_their_modules(
    package: Path, statement: str, found: list[str]
) -> None:
    (package / "lazy").mkdir()
    (package / "lazy/__init__.py").write_text(textwrap.dedent(LAZY))
    for name in ("one", "two", "three"):
        (package / f"lazy/{name}.py").write_text("class One: pass\ntwo = 2")
    (package / "entry.py").write_text(statement)
    assert list(CodeIndex(["lazy"]).digests(["entry:main"])) == found


def test_imports_for_type_checking_alone_bring_nothing(package: Path) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg import One"
    (package / "entry.py").write_text(text)
    assert list(CodeIndex(["pkg"]).digests(["entry:main"])) == ["entry"]


def test_an_edit_changes_only_the_module_edited(package: Path) -> None:
    before = CodeIndex(["pkg"]).digests(["pkg:One"])
    (package / "pkg/base.py").write_text("x = 2")
    after = CodeIndex(["pkg"]).digests(["pkg:One"])
    assert [name for name in before if before[name] != after[name]] == ["pkg.base"]


def test_circular_imports_and_reexports_end(package: Path) -> None:
    (package / "ring").mkdir()
    (package / "ring/__init__.py").write_text("from ring.a import x")
    (package / "ring/a.py").write_text("from ring import x\nfrom ring.b import y")
    (package / "ring/b.py").write_text("import ring.a")
    assert list(CodeIndex(["ring"]).digests(["ring.b:y"])) == ["ring.a", "ring.b"]


def test_nothing_is_imported(package: Path) -> None:
    (package / "pkg/one.py").write_text("raise SystemExit('imported')\nclass One: pass")
    CodeIndex(["pkg"]).digests(["pkg:One"])
    assert "pkg" not in sys.modules


def test_a_missing_module_and_broken_code_are_the_users_errors(package: Path) -> None:
    with pytest.raises(BadInput, match=r"'pkg.gone:f': there is no module 'pkg.gone'"):
        CodeIndex(["pkg"]).digests(["pkg.gone:f"])
    (package / "pkg/two.py").write_text("\ndef two(:\n")
    with pytest.raises(BadInput, match=r"two\.py:2: no valid Python"):
        CodeIndex(["pkg"]).digests(["pkg.two:two"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mine:build", None),
        ("mine:buid", "'mine:buid': 'mine' has no 'buid' (did you mean 'build'?)"),
        ("mein:build", "'mein:build': there is no module 'mein' here or among the installed ones"),
        ("pkg:One", None),
        ("pkg.inner:Deep", None),
        ("pkg:anything", None),  # a star import may bring it
        ("json:loads", None),
    ],
)
def test_missing_targets_are_named(package: Path, target: str, message: str | None) -> None:
    assert missing_target(target) == message


def test_sixty_modules_take_a_moment(toy: Path) -> None:
    text = FIXTURE.read_text().replace("from __future__ import annotations", "")
    body = text.replace("from .sibling", "from os") * 3  # some 300 lines
    for index in range(60):
        (toy / f"m{index}.py").write_text(f"import m{index + 1}\n{body}")
    began = time.process_time()
    assert len(CodeIndex([]).digests(["m0:f"])) == 60
    assert time.process_time() - began < 2  # 0.3 s on a quiet machine
