"""Traces of chosen steps, and compiled programs that a later run finds again."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from anima_jax.errors import UserError
from anima_jax.training.profiling import Profiler, parse_steps, use_compilation_cache, user_cache_folder

COMPILE = """
import sys
import jax, jax.numpy as jnp
from anima_jax.training.profiling import use_compilation_cache, watch_compilation

print(use_compilation_cache(None if sys.argv[1] == "default" else sys.argv[1]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
with watch_compilation() as found:
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
print(found)
"""


def compiled(folder, **environment):
    """The folder and the line of a fresh process that compiles one program."""
    clean = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env={**clean, **environment},
    )
    return result.stdout.splitlines()


def test_a_second_process_finds_what_the_first_one_compiled(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    folder, first = compiled("default", **environment)
    assert folder == str(tmp_path / "anima_jax" / "xla")
    assert first.endswith("s (compilation cache: miss)")
    assert compiled("default", **environment)[1].endswith("s (compilation cache: hit)")


def test_the_cache_can_be_elsewhere_or_off(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_cache_folder() == pathlib.Path.home() / ".cache" / "anima_jax" / "xla"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_cache_folder() == pathlib.Path.home() / ".cache" / "anima_jax" / "xla"
    before = jax.config.jax_compilation_cache_dir
    try:
        assert use_compilation_cache(str(tmp_path / "programs")) == str(tmp_path / "programs")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "programs")
        assert use_compilation_cache(None) == str(tmp_path / "programs")  # what JAX was told already stands
        assert use_compilation_cache("") is None
        assert jax.config.jax_compilation_cache_dir is None
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="compilation_cache_dir"):
            use_compilation_cache(str(tmp_path / "file" / "programs"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert use_compilation_cache(None) is None
    finally:
        use_compilation_cache(before or "")


def test_steps_to_profile_are_given_as_start_and_stop():
    assert list(parse_steps("10:13")) == [10, 11, 12]
    for text in ("10", "10:", "0:3", "5:5", "7:3", "a:b", "-1:3", "1:2:3"):
        with pytest.raises(UserError, match=f"--profile {text}: expected START:STOP"):
            parse_steps(text)


@pytest.mark.parametrize(("steps", "run"), [(range(2, 4), 5), (range(2, 9), 3)])
def test_a_trace_of_the_chosen_steps_is_written_even_if_the_run_ends_among_them(tmp_path, steps, run):
    double = jax.jit(lambda x: 2 * x)
    profiler = Profiler(steps, tmp_path / "profile")
    x, traced = jnp.ones(3), []
    for number in range(1, run + 1):
        x = profiler.run(number, double, x)
        traced.append(bool(list(tmp_path.rglob("*.xplane.pb"))))
    profiler.close()
    assert float(x[0]) == 2.0**run
    assert traced == [False] * (2 if run == 5 else 3) + [True] * (3 if run == 5 else 0)
    (trace,) = tmp_path.rglob("*.xplane.pb")
    marks = trace.read_bytes()
    assert b"train" in marks


def test_without_steps_nothing_is_written(tmp_path):
    profiler = Profiler(None, tmp_path / "profile")
    assert profiler.run(1, lambda x: x + 1, 1) == 2
    profiler.close()
    assert not list(tmp_path.iterdir())
