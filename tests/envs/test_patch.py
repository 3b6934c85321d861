"""Patches of an agent's changes, made from the files of a real sandbox."""

import io
import subprocess
import tarfile
from contextlib import contextmanager

import pytest
from support import sandbox_images

from aem_exp.envs.swe import generated, patch
from aem_exp.envs.swe.patch import Changes, File
from aem_exp.envs.swe.world import host_image
from aem_exp.sandboxes import Limits
from aem_exp.sandboxes.bwrap import Bwrap

LIMITS = Limits(memory_mb=400, disk_mb=64, processes=64, output_mb=1, cpu_seconds=60)


@pytest.fixture(scope="module")
def made():
    sandbox_images.needs_grading()
    return generated.generate_repository("dev-1", 2, 2)


@contextmanager
def start(made):
    """A sandbox with the repository."""
    with Bwrap().open(host_image(), LIMITS) as sandbox:
        assert not sandbox.run(generated.SETUP_SCRIPT, 30, made.stream).code
        yield sandbox


def changes_of(made, script):
    """The relevant changes of a script, and the patch."""
    with start(made) as agent:
        before = patch.list_files(agent)
        agent.run(script, 30)
        changes = patch.read_changes(agent, before)
    with Bwrap().open(host_image(), LIMITS) as fresh:
        base = patch.set_up_and_read(fresh, generated.SETUP_SCRIPT, made.stream, changes.paths)
        changes = patch.drop_irrelevant(changes, base)
        return changes, patch.diff(base.files, changes)


def apply(made, patch_text):
    """The listing of contents after the patch was applied to a fresh repository."""
    with start(made) as fresh:
        ran = fresh.run("cat > /tmp/p; git apply --verbose /tmp/p", 30, patch_text)
        assert not ran.code, ran.text
        paths = list(patch.list_files(fresh))
        return patch.read_files(fresh, paths)


CHANGES = """
printf 'a\\r\\nb' > crlf.txt
head -c 300 /dev/urandom > 'a "name" with \\ and ä'; printf x > -dash; mkdir -p deep/er; echo y > deep/er/file
ln -s README.md link; chmod +x README.md
rm CHANGES.md; mkdir CHANGES.md; echo z > CHANGES.md/inside
echo '# more' >> PATH_OF_MODULE
"""


@pytest.mark.machine
def test_a_patch_recreates_all_changes(made):
    script = CHANGES.replace("PATH_OF_MODULE", made.path)
    with start(made) as agent:
        before = patch.list_files(agent)
        agent.run(script, 30)
        wanted = patch.read_files(agent, list(patch.list_files(agent)))
        changes = patch.read_changes(agent, before)
    assert changes.removed == {"CHANGES.md"} and changes.written["link"] == File("120000", b"README.md")
    with start(made) as fresh:
        base = patch.read_files(fresh, changes.paths)
    assert apply(made, patch.diff(base, changes)) == wanted


@pytest.mark.machine
@pytest.mark.parametrize(
    "script",
    [
        "touch README.md",
        "echo x > README.md; git checkout -q README.md",
        "mkdir __pycache__; echo x > __pycache__/a.pyc",  # excluded by .gitignore
        "git commit -q --allow-empty -m x; git gc -q; git config user.name y",
        "git init -q sub; git init -q .git/sub",
        "mkfifo pipe; mkdir empty",
    ],
)
def test_what_is_no_change_gives_an_empty_patch(made, script):
    changes, text = changes_of(made, script)
    assert text == b"" and not changes.paths


@pytest.mark.machine
@pytest.mark.parametrize(
    "script",
    [
        "git config core.fsmonitor /bin/false; git update-index --assume-unchanged README.md",
        "echo '* -diff filter=x' > .git/info/attributes; git config filter.x.clean 'echo clean'",
        "echo README.md > .git/info/exclude; git rm -q --cached README.md",
        "rm -rf .git",
        "git config core.worktree /nowhere; mkdir -p ~/bin; printf '#!/bin/sh\\n' > ~/bin/git; chmod +x ~/bin/git",
    ],
)
def test_the_agents_git_does_not_decide(made, script):
    changes, text = changes_of(made, f"echo more >> README.md; {script}")
    assert changes.paths == ["README.md"] and b"\n+more\n" in text


@pytest.mark.machine
def test_large_ignored_files_are_not_copied(made):
    """As after the installation of a package: the agent's edit still counts."""
    script = "mkdir __pycache__; head -c 3000000 /dev/urandom > __pycache__/big; echo more >> README.md"
    changes, text = changes_of(made, script)
    assert changes.paths == ["README.md"] and b"\n+more\n" in text


@pytest.mark.machine
def test_a_path_behind_a_link_of_the_base_does_not_break_grading(made):
    """git refuses to look up such a path. Many names are sent in another way."""
    odd = patch.Changes({"link/x": File("100644", b"1\n"), **{f"new/{i}": File("100644", b"") for i in range(3000)}})
    for changes in (odd, patch.Changes({"link/x": odd.written["link/x"]})):
        with Bwrap().open(host_image(), LIMITS) as fresh:
            script = f"{generated.SETUP_SCRIPT}\nln -s tests link"
            base = patch.set_up_and_read(fresh, script, made.stream, changes.paths)
        assert patch.drop_irrelevant(changes, base) == changes


@pytest.mark.machine
def test_an_edit_that_keeps_size_and_time_is_seen(made):
    script = "t=$(stat -c %Y README.md); sed -i 's/a/b/' README.md; touch -d @$t README.md"
    assert changes_of(made, script)[0].paths == ["README.md"]


@pytest.mark.machine
@pytest.mark.parametrize("script", ["head -c 3000000 /dev/urandom > big", "chmod 000 ."])
def test_changes_that_cannot_be_copied_are_refused(made, script):
    with start(made) as agent:
        before = patch.list_files(agent)
        agent.run(script, 30)
        with pytest.raises(patch.UnreadableChanges):
            patch.read_changes(agent, before)


def archive(*members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as out:
        for member, data in members:
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def test_only_requested_files_are_read_from_an_archive():
    link, device = tarfile.TarInfo("./b"), tarfile.TarInfo("./c")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    data = archive((tarfile.TarInfo("../x"), b"1"), (tarfile.TarInfo("./a"), b"2"), (link, b""), (device, b""))
    assert patch.parse_archive(data, ["a", "b", "c"]) == {
        "a": File("100644", b"2"),
        "b": File("120000", b"/etc/passwd"),
    }


@pytest.mark.parametrize("data", [b"x" * 600, archive((tarfile.TarInfo("a"), b"x" * 2000))[:700]])
def test_a_damaged_archive_is_refused(data):
    with pytest.raises(patch.UnreadableChanges):
        patch.parse_archive(data, ["a"])


@pytest.mark.parametrize(
    ("path", "safe"),
    [
        ("a/b", True),
        ("a/..b", True),
        ("../a", False),
        ("/a", False),
        ("a/.git/x", False),
        ("a/.GIT/x", False),
        ("", False),
    ],
)
def test_safe_paths(path, safe):
    assert patch.is_safe_path(path) is safe


def test_a_patch_of_odd_names_is_valid_for_git(tmp_path):
    """git reads the quoted names of a stream as they are."""
    names = ['a "b"', "tab\there", "ä", "new\nline", "back\\slash", "-x"]
    text = patch.diff({}, Changes({name: File("100644", b"x\n") for name in names}))
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=text, check=True)
    assert {path.name for path in tmp_path.iterdir()} - {".git"} == set(names)
