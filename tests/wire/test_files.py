"""Deployment and mix files as editors, PowerShell and pranksters write them: read, or refused with a reason."""

from __future__ import annotations

import codecs
import io
from pathlib import Path

import pytest

from placement.errors import InvalidDeployment
from placement.wire.deployment import Deployment
from placement.wire.files import load_all, load_deployments, load_model
from placement.wire.workload import MixFile

TOML = '[[deployments]]\nname = "a"\nmodel = "m"\n'
YAML = "deployments:\n- {name: a, model: m}\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.toml", codecs.BOM_UTF8 + TOML.encode()),
        ("bom.yaml", codecs.BOM_UTF8 + YAML.encode()),
        ("powershell.toml", codecs.BOM_UTF16_LE + TOML.encode("utf-16-le")),
        ("big-endian.toml", codecs.BOM_UTF16_BE + TOML.encode("utf-16-be")),
        ("no-mark.toml", TOML.encode("utf-16-le")),
        ("powershell.yaml", codecs.BOM_UTF16_LE + YAML.encode("utf-16-le")),
        ("windows.toml", TOML.replace("\n", "\r\n").encode()),
        ("windows.yaml", YAML.replace("\n", "\r\n").encode()),
        ("UPPER.TOML", TOML.encode()),
        ("UPPER.YAML", YAML.encode()),
        ("Upper.Yml", YAML.encode()),
        ("anchors.yaml", b"deployments:\n- &first {name: a, model: m}\n"),
        ("cut.yaml", YAML.strip().encode()),
    ],
)
def test_a_deployment_file_is_read_however_it_is_written(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    [one] = load_deployments(path)
    assert ("a", "m") == (one.name, one.model)


def test_anchors_and_merged_fields_are_read(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text(
        "deployments:\n- &base {name: a, model: m, gpus: 2}\n"
        "- {<<: *base, name: b, replicas: 3}\n- {<<: *base, name: c}\n"
    )
    assert [("a", 2, 1), ("b", 2, 3), ("c", 2, 1)] == [
        (one.name, one.gpus, one.replicas) for one in load_deployments(path)
    ]


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{here}: &{here} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, here in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.toml", b"", "is empty; add at least one deployment"),
        ("empty.yaml", b"\n# nothing\n", "is empty; add at least one deployment"),
        ("mark.toml", codecs.BOM_UTF8, "is empty; add at least one deployment"),
        ("list.yaml", b"- {name: a, model: m}\n", "is not a mapping; put the deployments under deployments:"),
        ("one.yaml", b"a", "is not a mapping"),
        ("two.yaml", b"a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("binary.toml", bytes(range(256)), "is not UTF-8 text"),
        ("zeros.toml", bytes(64), "is not"),
        ("latin.toml", '# Größe\n[[deployments]]\nname = "a"'.encode("latin-1"), "is not UTF-8 text"),
        ("deep.yaml", b"a: " + b"[" * 50_000 + b"]" * 50_000, "nested more than 64 deep at line 1"),
        ("deep-open.yaml", b"{a: " * 50_000, "nested more than 64 deep"),
        ("deep-lines.yaml", "".join(" " * i + "a:\n" for i in range(2000)).encode(), "nested more than 64 deep"),
        ("deep.toml", b"a = " + b"[" * 50_000 + b"]" * 50_000, "is nested more than 64 deep"),
        ("deep-keys.toml", b".".join([b"a"] * 3000) + b" = 1", "is nested more than 64 deep"),
        ("deep-options.toml", TOML.encode() + b"runtime_config.options." + b".".join([b"a"] * 70) + b" = 1", "64 deep"),
        ("laughs.yaml", LAUGHS.encode(), "more than 1,000,000 values, aliases resolved"),
        ("cycle.yaml", b"deployments: &a [*a]\n", "an alias refers to a value that contains it at line 1"),
        ("unknown.yaml", b"deployments: *a\n", "found undefined alias"),
        ("twice.yaml", b"deployments:\n- {name: a, gpus: 1, gpus: 8}\n", "key 'gpus' is there twice at line 2"),
        ("twice-top.yaml", YAML.encode() * 2, "key 'deployments' is there twice at line 3, column 1"),
        ("twice.toml", TOML.encode() + b'name = "b"\n', "is not valid TOML"),
        ("tabs.yaml", b"deployments:\n\t- name: a\n", "found character '\\t' that cannot start any token at line 2"),
        ("control.yaml", b"a: \x01", "special characters are not allowed"),
        ("date.yaml", b"a: 2001-99-99", "a value that is no timestamp at line 1, column 4"),
        ("tag.yaml", b"a: !!int x", "a value that is no int at line 1, column 4"),
        ("object.yaml", b"a: !!python/object/apply:os.system [x]", "is not valid YAML"),
        ("digits.yaml", b"a: 1" + b"0" * 5000, "a value that is no int"),
        ("digits.toml", b"a = 1" + b"0" * 5000, "a number is too long"),
        ("date.toml", b"a = 2001-99-99", "is not valid TOML"),
        ("long.toml", TOML.encode() + b"gpus = " + b"9" * 4000, "gpus: "),
        ("nan.toml", TOML.encode() + b"gpus = nan", "gpus: "),
        ("inf.toml", TOML.encode() + b"budget = {usd_per_day = inf}", "budget.usd_per_day: "),
        ("options.toml", TOML.encode() + b"runtime_config.options.x = [nan]", "which JSON cannot carry"),
        ("w.txt", TOML.encode(), "has the ending '.txt'"),
        ("none", TOML.encode(), "has the ending ''"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_the_reason(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidDeployment) as caught:
        load_deployments(path)
    assert says in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < 600


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "deployments.toml"
    folder.mkdir()
    with pytest.raises(InvalidDeployment, match="cannot be read: Is a directory"):
        load_deployments(folder)


@pytest.mark.parametrize("field", ["weight", "mean_minutes", "load", "arrivals"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e-320", "1e308"])
def test_a_mix_has_numbers_that_can_be_drawn_with(tmp_path: Path, field: str, value: str) -> None:
    from placement.core.snapshot import Snapshot
    from placement.wire.workload import load_workload

    path = tmp_path / "mix.toml"
    number = f"{field} = {value}\n"
    path.write_text((number if field in ("load", "arrivals") else "") + "[[mix]]\ngpus = 1\n"
                    + (number if field in ("weight", "mean_minutes") else ""))  # fmt: skip
    with pytest.raises(InvalidDeployment, match=field):
        load_workload(path)(Snapshot(()))


def test_a_mix_in_utf_16_and_upper_case(tmp_path: Path) -> None:
    path = tmp_path / "MIX.TOML"
    path.write_bytes("[[mix]]\ngpus = 4\n".encode("utf-16"))
    assert ({"gpus": 4},) == load_model(MixFile, path).mix


@pytest.mark.parametrize("value", ["010", "1:30", "-012", "12:30:45", "1:30.5"])
def test_a_number_that_yaml_takes_for_another_is_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(f"deployments:\n- {{name: a, model: m, gpus: {value}}}\n")
    with pytest.raises(InvalidDeployment, match="is a number to the base 8 or 60; quote it"):
        load_deployments(path)
    path.write_text(f"deployments:\n- {{name: a, model: '{value}'}}\n")
    assert value == load_deployments(path)[0].model


def declare(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("deployments:\n" + "".join(f"- {{name: {name}, model: m}}\n" for name in names))
    return path


def names(found: list[Deployment]) -> list[str]:
    return [one.name for one in found]


def test_folders_are_read_in_order_and_files_once(tmp_path: Path) -> None:
    declare(tmp_path / "b.yml", "b")
    declare(tmp_path / "a.yaml", "a2", "a1")
    (tmp_path / "c.TOML").write_text('[[deployments]]\nname = "c"\nmodel = "m"\n')
    (tmp_path / "README.md").write_text("not read")
    declare(tmp_path / "inner" / "deep" / "d.yaml", "d")
    assert ["a2", "a1", "b", "c"] == names(load_all([tmp_path]))
    assert ["a2", "a1", "b", "c", "d"] == names(load_all([tmp_path], recursive=True))
    assert ["b", "a2", "a1", "c"] == names(
        load_all([tmp_path / "b.yml", tmp_path, tmp_path / "inner" / ".." / "b.yml"])
    )


def test_a_name_in_two_files_is_one_error_that_names_both(tmp_path: Path) -> None:
    first, second = declare(tmp_path / "a.yaml", "x", "same"), declare(tmp_path / "b.yaml", "same", "y")
    with pytest.raises(InvalidDeployment) as raised:
        load_all([first, second])
    assert (str(second), (f"name 'same' is already used in {first}; rename one",)) == raised.value.args


def test_what_is_wrong_in_several_files_is_told_at_once(tmp_path: Path) -> None:
    bad, empty = tmp_path / "bad.yaml", tmp_path / "empty"
    bad.write_text("deployments: [{name: a, model: m, gpus: 0}]")
    empty.mkdir()
    with pytest.raises(InvalidDeployment) as raised:
        load_all([bad, tmp_path / "none.toml", empty, declare(tmp_path / "good.yaml", "good")])
    source, problems = raised.value.args
    assert "3 files" == source
    further = "name another folder, or add --recursive if they are in folders of it"
    first, second, third = problems
    assert f"{empty}: holds no file that ends in .toml, .yaml or .yml; {further}" == first
    assert second.startswith(f"{bad}: deployment 1 (a): gpus: 0 is too small; use at least 1")
    assert f"{tmp_path / 'none.toml'}: cannot be read: No such file or directory; check the path" == third
    with pytest.raises(InvalidDeployment, match="cannot be read: No such file"):
        load_all([tmp_path / "none.toml"])
    with pytest.raises(InvalidDeployment, match="name at least one file"):
        load_all([])


@pytest.mark.parametrize(
    "content",
    [
        TOML,
        YAML,
        TOML.replace("[[deployments]]", "  [[ deployments ]]  # a"),
        'deployments = [{ name = "a", model = "m" }]\n',
        "{deployments: [{name: a, model: m}]}",
    ],
)
def test_standard_input_is_toml_or_yaml(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert ["a"] == names(load_all(["-"]))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is empty"),
        ("[[deployments]]\nname =", "is not valid TOML"),
        (
            TOML.replace("[[deployments]]", "[[deployment]]"),
            "unknown field 'deployment' at the top; did you mean",
        ),
    ],
)
def test_what_is_wrong_with_standard_input_is_said_of_it(
    content: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    with pytest.raises(InvalidDeployment, match=f"standard input: {problem}"):
        load_all(["-"])
