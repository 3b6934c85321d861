"""The agent's tools: the parsing of responses, and the effect of each tool on a repository."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.runs import skip_or_fail

from aem_exp.envs.swe.tools import TOOLS, InvalidCall, ToolCall, Tools, clip, parse_call
from aem_exp.sandboxes import Image, Limits
from aem_exp.sandboxes.bwrap import Bwrap

BASH = "<function=execute_bash>\n<parameter=command>\nls -l\n</parameter>\n</function>"
EDIT = "<function=file_editor><parameter=command>{}</parameter><parameter=path>f.py</parameter>{}</function>"


@pytest.mark.parametrize(
    "response",
    [
        BASH,
        f"I look.\n\n{BASH}\nand then I will see",
        f"<think>maybe <function=finish></function></think>{BASH}",
        BASH.removesuffix("</function>"),  # the response ended before the closing tag
        BASH.replace("=execute_bash", " = execute_bash ").replace("=command", " = command "),
        BASH.replace("\n", " ").replace(" ls -l ", "ls -l"),
        f"{BASH}\n<function=finish></function>",  # only the first call of a response counts
    ],
)
def test_unambiguous_calls_are_parsed(response):
    assert parse_call(response) == ToolCall("execute_bash", {"command": "ls -l"})


def test_a_value_is_the_text_between_its_tags():
    code = "\n    if a < b:\n\n        return '</p>'\n"
    response = EDIT.format("create", f"<parameter=file_text>\n{code}\n</parameter>")
    assert parse_call(response).arguments["file_text"] == code
    assert parse_call(str(parse_call(response))) == parse_call(response)


# The texts of InvalidCall and of the tools are observations of the agent. If they change, raise `swe.world.RULES_VERSION`.


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("", "there is no call"),
        (BASH.replace("ls", "l\0s"), "a call is text"),
        (BASH.replace("ls", "l\ud800s"), "a call is text"),
        (BASH.replace("ls", "x" * 200_000), "a call is text of at most 100,000 characters"),
        ("ls -l", "there is no call"),
        (f"<think>{BASH}", "did not end with </think>"),
        (
            BASH.replace("execute_bash", "bash"),
            "there is no tool 'bash': the tools are file_editor, search, execute_bash, finish",
        ),
        (BASH.replace("=command", "=cmd"), "execute_bash has no parameter 'cmd': it takes command"),
        ("<function=execute_bash></function>", "execute_bash needs command"),
        (BASH.replace("</parameter>", ""), "is no parameter, or one that does not end"),
        (BASH.replace("<parameter", "ls -a <parameter"), "'ls -a"),
        (BASH.replace("</function>", "<parameter=command>rm</parameter></function>"), "given command twice"),
        (EDIT.format("delete", ""), "has no command 'delete': choose view, create"),
        (EDIT.format("create", ""), "create needs file_text"),
        (EDIT.format("insert", "<parameter=new_str>x</parameter>"), "insert needs insert_line"),
        (EDIT.format("undo_edit", "").replace("<parameter=path>f.py</parameter>", ""), "file_editor needs path"),
    ],
)
def test_incomplete_and_unknown_calls_are_refused(response, message):
    with pytest.raises(InvalidCall) as caught:
        parse_call(response)
    assert message in str(caught.value)


@given(st.text(max_size=300), st.sampled_from([*TOOLS, "", "x"]))
def test_any_response_is_a_call_or_an_invalid_call(text, tool):
    for response in (
        text,
        f"<function={tool}>{text}",
        f"<function={tool}><parameter=command>{text}</parameter>{text}</function>",
    ):
        with contextlib.suppress(InvalidCall):
            assert parse_call(response).tool in TOOLS


def test_a_long_malformed_response_is_parsed():
    for part in ("<function=execute_bash>", "<parameter=command>", "<think>", "</think>", "<", "</parameter>"):
        with contextlib.suppress(InvalidCall):
            parse_call(part * (200_000 // len(part)))


def test_output_is_cut_in_the_middle():
    text = "\n".join(map(str, range(1000)))
    lines = clip(text).split("\n")
    assert lines[:40] == [str(n) for n in range(40)] and lines[-1] == "999" and "920 lines left out" in lines[40]
    assert len(clip("x" * 10**6)) < 13_000
    assert clip("short\ntext") == "short\ntext"


# In a sandbox.


@pytest.fixture(scope="module")
def sandbox():
    if reason := Bwrap().missing():
        skip_or_fail(reason)
    with Bwrap().open(Image(), Limits(memory_mb=300, disk_mb=50, output_mb=1)) as opened:
        yield opened


@pytest.fixture
def tools(sandbox):
    sandbox.run(
        "rm -rf -- * && mkdir pkg && printf 'a = 1\\nb = 2\\nb = 2\\n' > pkg/f.py && printf '\\377' > binary", 10
    )
    return Tools(sandbox, 2.0)


def edit(tools, command, path="pkg/f.py", **parameters):
    return tools.execute(ToolCall("file_editor", {"command": command, "path": path, **parameters}), 60)


def test_a_folder_and_a_file_are_viewed(tools):
    assert "./pkg/f.py" in edit(tools, "view", ".")
    assert edit(tools, "view") == "     1\ta = 1\n     2\tb = 2\n     3\tb = 2"
    assert edit(tools, "view", "/testbed/pkg/f.py", view_range="[2, -1]") == "     2\tb = 2\n     3\tb = 2"


@pytest.mark.slow
def test_edits_can_be_undone(tools, sandbox):
    assert "     1\ta = 5" in edit(tools, "str_replace", old_str="a = 1", new_str="a = 5")
    edit(tools, "insert", insert_line="1", new_str="c = 3\nd = 4")
    assert sandbox.get("pkg/f.py") == b"a = 5\nc = 3\nd = 4\nb = 2\nb = 2\n"
    for _ in range(2):
        assert "is undone" in edit(tools, "undo_edit")
    assert sandbox.get("pkg/f.py") == b"a = 1\nb = 2\nb = 2\n"
    assert "no edit" in edit(tools, "undo_edit")
    assert edit(tools, "create", "new/g.py", file_text="x") == "/testbed/new/g.py is written"
    assert sandbox.get("new/g.py") == b"x\n"
    edit(tools, "undo_edit", "new/g.py")
    with pytest.raises(OSError):
        sandbox.get("new/g.py")


def test_an_edit_keeps_windows_line_endings(tools, sandbox):
    sandbox.put("pkg/f.py", b"a = 1\r\nb = 2\r\n")
    edit(tools, "str_replace", old_str="a = 1\nb = 2", new_str="a = 1\nb = 3")
    assert sandbox.get("pkg/f.py") == b"a = 1\r\nb = 3\r\n"


@pytest.mark.parametrize(
    ("command", "path", "parameters", "message"),
    [
        (
            "str_replace",
            "pkg/f.py",
            {"old_str": "b = 2", "new_str": "x"},
            "occurs 2 times in /testbed/pkg/f.py, not once",
        ),
        ("str_replace", "pkg/f.py", {"old_str": "z", "new_str": "x"}, "occurs 0 times"),
        ("str_replace", "pkg/f.py", {"old_str": "", "new_str": "x"}, "old_str is empty"),
        ("str_replace", "none.py", {"old_str": "a", "new_str": "x"}, "cannot be read"),
        ("view", "none.py", {}, "cannot be read"),
        ("view", "binary", {}, "is not a text file"),
        ("view", "pkg/f.py", {"view_range": "[9, 12]"}, "the file has 3 lines"),
        ("view", "pkg/f.py", {"view_range": "all"}, "two line numbers"),
        ("insert", "pkg/f.py", {"insert_line": "99", "new_str": "x"}, "must be a line from 0 to"),
        ("create", "/usr/bin/x", {"file_text": "x"}, "Read-only file system"),
        ("create", "pkg", {"file_text": "x"}, "irectory"),
    ],
)
def test_an_impossible_edit_is_answered_with_an_error(tools, command, path, parameters, message):
    observation = edit(tools, command, path, **parameters)
    assert observation.startswith("ERROR: ") and message in observation


@pytest.mark.slow
def test_the_answer_of_a_command_says_how_it_ended(tools):
    def bash(command):
        return tools.execute(ToolCall("execute_bash", {"command": command}), 60)

    assert bash("echo hi; exit 3") == "hi\n[exit code 3]"
    assert bash("true") == "[exit code 0]"
    assert bash("sleep 50").endswith("[stopped after 2 s]")
    assert bash("yes | head -c 3000000").endswith("[stopped after 1 MB of output]")
    assert len(bash("yes | head -n 5000").split("\n")) < 90
    limited = tools.execute(ToolCall("execute_bash", {"command": "sleep 50"}), 0.2)  # the rest of the episode
    assert limited.endswith("[stopped after 0.2 s]")


def test_a_search_finds_lines_and_files(tools):
    def search(term, path=None):
        return tools.execute(ToolCall("search", {"search_term": term} | ({"path": path} if path else {})), 60)

    assert search("b = 2") == "'b = 2' in .:\n./pkg/f.py:2"
    assert search("b = 2", "pkg/f.py") == "'b = 2' in pkg/f.py:\n2:b = 2\n3:b = 2"
    assert "does not occur" in search("-z [")
    assert search("x", "nowhere") == "ERROR: there is no nowhere"
