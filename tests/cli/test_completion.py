"""Shell completion: the scripts that `qm-cupy completion` prints."""

import shutil
import subprocess
import sys

import pytest

from qm_cupy.cli.main import main


def test_bash_completes(tmp_path, capsys):
    """A bash that has read the script completes commands, options and files."""
    pytest.importorskip("shtab")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("this machine has no bash")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "states.npz").touch()

    def complete(*words):
        # bash calls the function with these variables set.
        text = " ".join(f"'{word}'" for word in words)
        code = f"""
source {script}
COMP_WORDS=({text}); COMP_CWORD={len(words) - 1}
function=$(complete -p qm-cupy | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        done = subprocess.run(
            [bash, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return set(done.stdout.split())

    commands = {"compress", "info", "demo", "doctor", "completion"}
    assert complete("qm-cupy", "") >= commands
    assert complete("qm-cupy", "compress", "--max") == {"--max-error", "--max-distance"}
    assert {"average", "ward"} <= complete("qm-cupy", "compress", "--method", "")
    assert "states.npz" in complete("qm-cupy", "info", "sta")
    assert "states.npz" in complete("qm-cupy", "compress", "-o", "sta")


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(capsys, shell):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert "weighted-linkage" in printed
    assert "qm-cupy" in printed


def test_without_shtab(monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "shtab", None)
    fails(["completion", "bash"], "shell completion needs shtab: pip install")
    fails(["completion", "fish"], "invalid choice: 'fish'")
