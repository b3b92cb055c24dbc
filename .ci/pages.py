"""Runs the code of README and docs as a stranger would: with a wheel, in an empty environment.

    python .ci/pages.py dist/jaxquant-*.whl [docs/howto/gguf.md ...]

For each page it makes an environment with the wheel and with what the page says to install, and
runs the blocks of the page, one after another, in an empty folder. Fails if a page does not run.
Packages come from pip's index.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).parents[1]
# README's developer section installs these, for other purposes than to run its code.
OF_DEVELOPERS = {"docs", "test", "checkpoints-check", "bench"}


def blocks_of(text: str) -> list[str]:
    """Code of a page, and of a notebook."""
    return re.findall(r"```(?:python|\{code-cell\})\n(.*?)```", text, re.DOTALL)


def needs_of(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Extras, and packages without their dependencies, that a page says to install."""
    commands = " ".join(text.split())
    found = re.findall(r"pip install (?:-e )?'\.\[([\w,-]+)\]'", commands)
    extras = {extra for names in found for extra in names.split(",")} - OF_DEVELOPERS
    found = re.findall(r"pip install --no-deps ([\w-]+(?: [\w-]+)*)(?=`| &&|$)", commands)
    return tuple(sorted(extras)), tuple(sorted({name for line in found for name in line.split()}))


def environment(folder: pathlib.Path, wheel: pathlib.Path, needs: tuple) -> pathlib.Path:
    """Path of the Python of an environment, which is made if there is none."""
    extras, packages = needs
    path = folder / "-".join(["environment", *extras, *packages])
    python = path / "bin" / "python"
    if not python.exists():
        venv.create(path, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, f"{wheel}[{','.join(extras)}]" if extras else str(wheel)], check=True)
        if packages:
            subprocess.run([*pip, "--no-deps", *packages], check=True)
    return python


def run_page(path: pathlib.Path, python: pathlib.Path) -> str | None:
    """The end of what a page prints if it fails; None if it does not."""
    blocks = blocks_of(path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        script = pathlib.Path(folder, "page.py")
        script.write_text("\n".join(blocks))
        # Isolated: neither the repository nor the user's packages are on the path.
        command = [str(python), "-I", str(script)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stderr[-2000:] if done.returncode else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=pathlib.Path)
    parser.add_argument("pages", type=pathlib.Path, nargs="*", help="default: README and docs")
    parser.add_argument("--folder", type=pathlib.Path, help="keeps environments here")
    options = parser.parse_args()
    pages = options.pages or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or pathlib.Path(temporary)).resolve()
        for page in pages:
            text = page.read_text()
            if not blocks_of(text):
                continue
            needs = needs_of(text)
            error = run_page(page, environment(folder, options.wheel.resolve(), needs))
            print(f"{page}: {' '.join([*needs[0], *needs[1]]) or 'the wheel alone'}: ", end="")
            print("runs" if error is None else f"FAILS\n{error}", flush=True)
            failed += error is not None
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
