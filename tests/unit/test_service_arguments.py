"""What an operator may set of the service: by which way, with which values, and what is refused."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from ad2kit.run.errors import UserError
from ad2kit.run.sections import TextLength
from ad2kit.service.settings import OF_A_CHECKOUT, Settings, client_key, keys_of, read_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

BENTOML = "/usr/bin/bentoml"
# One of each, as they are typed, and as they are read.
ALL = {
    "model": ("/runs/one", "/runs/one"),
    "runs_dir": ("/runs", "/runs"),
    "models": ("one=/runs/one,two=/runs/two", "one=/runs/one,two=/runs/two"),
    "workers": ("3", 3),
    "threads": ("2", 2),
    "api_keys": ("one,two", "one,two"),
    "api_keys_file": ("/keys", "/keys"),
    "shadow": ("/teacher", "/teacher"),
    "shadow_share": ("0.5", 0.5),
    "access_log": ("true", True),
    "root_path": ("/ad2kit", "/ad2kit"),
    "cors_origins": ("https://a.example,http://b:8080", "https://a.example,http://b:8080"),
    "max_body_bytes": ("2048", 2048),
    "max_held_bytes": ("4096", 4096),
    "max_header_bytes": ("1024", 1024),
    "max_headers": ("9", 9),
    "header_timeout_s": ("0.5", 0.5),
    "body_timeout_s": ("1.5", 1.5),
    "write_timeout_s": ("2.5", 2.5),
    "keep_alive_s": ("3.5", 3.5),
    "max_connections": ("7", 7),
    "max_connection_requests": ("100", 100),
    "metrics_port": ("9100", 9100),
    "max_texts": ("5", 5),
    "max_text_characters": ("1000", 1000),
    "max_key_requests_per_s": ("2.5", 2.5),
    "max_queue_texts": ("6", 6),
    "max_queue_tokens": ("4096", 4096),
    "max_batch_tokens": ("512", 512),
    "deadline_s": ("4.5", 4.5),
}
# One value of each setting that is refused, and what is said to be right.
WRONG = {
    "model": ("", "a text that is not empty"),
    "runs_dir": ("", "a text that is not empty"),
    "models": ("one=/runs/one,one=/runs/two", "NAME=FOLDER with commas between them"),
    "workers": ("0", "a whole number, at least 1, at most 1024"),
    "threads": ("1025", "a whole number, at least 1, at most 1024"),
    "api_keys": (",", "one key a line"),
    "api_keys_file": ("", "a text that is not empty"),
    "shadow": ("", "a text that is not empty"),
    "shadow_share": ("2", "a number, above 0, at most 1"),
    "access_log": ("maybe", "true or false"),
    "root_path": ("/ad2kit/", "a path such as /ad2kit, without a slash at its end"),
    "cors_origins": ("https://a.example/", "* or origins with commas between them"),
    "max_body_bytes": ("1023", "a whole number, at least 1024, at most 67108864"),
    "max_held_bytes": ("1MB", "a whole number, at least 1024, at most 4294967296"),
    "max_header_bytes": ("", "a whole number, at least 1024, at most 1048576"),
    "max_headers": ("7", "a whole number, at least 8, at most 10000"),
    "header_timeout_s": ("0", "a number, at least 0.1, at most 3600"),
    "body_timeout_s": ("inf", "a number, at least 0.1, at most 3600"),
    "write_timeout_s": ("nan", "a number, at least 0.1, at most 3600"),
    "keep_alive_s": ("-1", "a number, at least 0.1, at most 3600"),
    "max_connections": ("0", "a whole number, at least 1, at most 65536"),
    "max_connection_requests": ("0", "a whole number, at least 1, at most 2147483648"),
    "metrics_port": ("65536", "a whole number, at least 1, at most 65535"),
    "max_texts": ("0", "a whole number, at least 1, at most 65536"),
    "max_text_characters": ("0", "a whole number, at least 1, at most 67108864"),
    "max_key_requests_per_s": ("0", "a number, above 0, at most 1000000"),
    "max_queue_texts": ("1e3", "a whole number, at least 1, at most 1048576"),
    "max_queue_tokens": ("0", "a whole number, at least 1, at most 1073741824"),
    "max_batch_tokens": ("two", "a whole number, at least 1, at most 1048576"),
    "deadline_s": ("5s", "a number, at least 0.1, at most 3600"),
}


def read(
    environment: Mapping[str, str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    command: Sequence[str] = (),
    *,
    packed: bool = False,
) -> Settings:
    """Read settings as the parent process of a service does."""
    return read_settings(arguments or {}, environment or {}, [BENTOML, *command], packed=packed)


def settings_of(**values: Any) -> Settings:
    return Settings.model_validate(values)


def refusal(*given: Any, **more: Any) -> str:
    with pytest.raises(UserError) as refused:
        read(*given, **more)
    return f"{refused.value.message}; {refused.value.hint}"


def test_every_setting_can_be_set_by_the_environment() -> None:
    assert set(ALL) == set(Settings.model_fields)
    for name, (text, value) in ALL.items():
        assert read({f"AD2KIT_{name.upper()}": text}) == settings_of(**{name: value})


@pytest.mark.parametrize("name", sorted(set(ALL) - {"api_keys"}))
def test_a_checkout_can_be_set_by_arguments_too(name: str, tmp_path: Path) -> None:
    text, value = ALL[name]
    file = tmp_path / "arguments.yaml"
    file.write_text(f"{name}: {text}\n")
    for command, handed_on in (
        (["serve", "--arg", f"{name}={text}"], text),
        (["serve", f"--arg={name}={text}"], text),
        (["serve", "--arg-file", str(file)], value),  # YAML's numbers and truths
        (["serve", f"--arg-file={file}"], value),
        (["serve", "--", f"--arg={name}=other"], text),
    ):
        assert read({}, {name: handed_on}, command) == settings_of(**{name: value})
    # Whoever says the same twice is understood.
    assert read({f"AD2KIT_{name.upper()}": text}, {name: value}) == settings_of(**{name: value})


def test_a_key_on_the_command_line_is_refused_and_not_repeated() -> None:
    said = refusal({}, {"api_keys": "hunter2"}, ["serve", "--arg", "api_keys=hunter2"])
    assert "other users of the machine can read it" in said
    assert "AD2KIT_API_KEYS" in said
    assert "hunter2" not in said
    lost = refusal({}, {}, ["serve", "--arg=api_keys=hunter2"], packed=True)
    assert "AD2KIT_API_KEYS=…" in lost
    assert "hunter2" not in lost


@pytest.mark.parametrize("spelling", ["apart", "joined", "file", "file joined"])
@pytest.mark.parametrize("name", sorted(ALL))
def test_an_argument_that_was_lost_is_refused(name: str, spelling: str, tmp_path: Path) -> None:
    text, _ = ALL[name]
    file = tmp_path / "arguments.yaml"
    file.write_text(f"{name}: {text}\n")
    command = {
        "apart": ["--arg", f"{name}={text}"],
        "joined": [f"--arg={name}={text}"],
        "file": ["--arg-file", str(file)],
        "file joined": [f"--arg-file={file}"],
    }[spelling]
    for program in ("/usr/bin/bentoml", "/site-packages/bentoml/__main__.py"):
        with pytest.raises(UserError, match=f"{name}=` was given, and BentoML drops it") as refused:
            read_settings({}, {}, [program, "serve", "ad2kit-demo:1", *command], packed=True)
        if name in ("model", "runs_dir"):
            assert "leave it out" in refused.value.hint
        elif name != "api_keys":
            assert f"set AD2KIT_{name.upper()}={text} in".lower() in refused.value.hint.lower()
    # What is no command of BentoML's has arguments of its own.
    assert read_settings({}, {}, ["pytest", *command], packed=True) == Settings()


def test_a_lost_path_is_shown_as_it_has_to_be_typed() -> None:
    said = refusal({}, {}, ["serve", "--arg", "api_keys_file=my keys"], packed=True)
    assert """AD2KIT_API_KEYS_FILE="$PWD"/'my keys' in""" in said


def test_a_lost_file_that_cannot_be_found_again_is_refused() -> None:
    said = refusal({}, {}, ["serve", "--arg-file", "elsewhere.yaml"], packed=True)
    assert "`--arg-file elsewhere.yaml` was given, and BentoML drops it" in said
    assert read({}, {"workers": "2"}, ["serve", "--arg-file", "elsewhere.yaml"]) == Settings(
        workers=2
    )


@pytest.mark.parametrize("words", [["--timeout-keep-alive", "9"], ["--timeout-keep-alive=9"]])
def test_an_option_of_bentoml_that_a_setting_replaces_is_refused(words: list[str]) -> None:
    assert "set AD2KIT_KEEP_ALIVE_S" in refusal({}, {}, ["serve", *words])
    assert read_settings({}, {}, ["uvicorn", *words], packed=True) == Settings()


def test_an_argument_that_was_given_twice_is_refused() -> None:
    command = ["serve", "--arg", "workers=2", "--arg", "workers=3"]
    assert "BentoML hands on '3': it was given twice" in refusal({}, {"workers": "3"}, command)


def test_argument_and_variable_that_differ_are_refused() -> None:
    said = refusal({"AD2KIT_WORKERS": "3"}, {"workers": "2"})
    assert "as '2' by --arg and as '3' by AD2KIT_WORKERS" in said
    assert read({"AD2KIT_SHADOW_SHARE": ".5"}, {"shadow_share": "0.50"}).shadow_share == 0.5


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("workers", "0", "a whole number, at least 1, at most 1024"),
        ("workers", "2.5", "a whole number, at least 1, at most 1024"),
        ("workers", "", "a whole number"),
        ("workers", "True", "a whole number"),
        ("threads", "-1", "a whole number, at least 1"),
        ("threads", "two", "a whole number"),
        ("shadow_share", "0", "a number, above 0, at most 1"),
        ("shadow_share", "nan", "a number, above 0, at most 1"),
        ("shadow_share", "1.1", "a number, above 0, at most 1"),
        ("access_log", "maybe", "true or false"),
        ("model", "", "a text that is not empty"),
        ("api_keys_file", "", "a text that is not empty"),
        ("root_path", "", "a path such as /ad2kit"),
        ("root_path", "/", "a path such as /ad2kit"),
        ("root_path", "ad2kit", "a path such as /ad2kit"),
        ("root_path", '/"><script>', "a path such as /ad2kit"),
        ("root_path", "/a\n", "a path such as /ad2kit"),
        *(
            ("root_path", path, "a path such as /ad2kit")
            for path in ("/..", "/a/../b", "/.", "/a/.")
        ),
        *(
            ("root_path", path, "a path such as /ad2kit")
            for path in ("/classify", "/livez", "/info")
        ),
        ("cors_origins", "https://a.b:443", "* or origins"),
        ("cors_origins", "http://a.b:80", "* or origins"),
        ("cors_origins", "https://a.example, https://[::1]:443", "* or origins"),
        ("cors_origins", "https://a.b:08443", "* or origins"),
        ("cors_origins", "https://a.b:65536", "* or origins"),
        ("cors_origins", "", "* or origins"),
        ("cors_origins", "a.example", "* or origins"),
        ("cors_origins", "https://A.example", "* or origins"),
        ("cors_origins", "*, https://a.example", "* or origins"),
        ("cors_origins", "https://a.example,", "* or origins"),
        ("cors_origins", "null", "* or origins"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_right(name: str, text: str, expected: str) -> None:
    said = refusal({f"AD2KIT_{name.upper()}": text})
    assert f"AD2KIT_{name.upper()}: expected {expected}" in said
    assert f"found {text!r}" in said
    assert f"--arg {name}: expected {expected}" in refusal({}, {name: text})


@pytest.mark.parametrize("packed", [True, False], ids=["Bento", "checkout"])
@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_each_setting_is_in_force_or_refused_with_its_name_and_range(
    name: str, packed: bool
) -> None:
    variable = f"AD2KIT_{name.upper()}"
    text, expected = WRONG[name]
    with pytest.raises(UserError) as refused:
        read({variable: text}, packed=packed).keys()
    said = f"{refused.value.message}; {refused.value.hint}"
    assert variable in said
    assert expected in said
    if not (packed and name in OF_A_CHECKOUT):
        text, value = ALL[name]
        assert getattr(read({variable: text}, packed=packed), name) == value


def test_a_truth_in_a_file_is_no_number() -> None:
    assert "found 'True'" in refusal({}, {"workers": True})


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("AD2KIT_API_KEY", "AD2KIT_API_KEYS"),
        ("AD2KIT_APIKEYS_FILE", "AD2KIT_API_KEYS_FILE"),
        ("AD2KIT_WORKER", "AD2KIT_WORKERS"),
        ("ad2kit_workers", "AD2KIT_WORKERS"),
        ("AD2KIT_SHADOWSHARE", "AD2KIT_SHADOW_SHARE"),
    ],
)
def test_a_misspelt_setting_is_refused_and_the_nearest_named(variable: str, meant: str) -> None:
    assert f"has {variable}, and there is no such setting (did you mean '{meant}'?)" in refusal(
        {variable: "1"}
    )
    name = variable.upper().removeprefix("AD2KIT_").lower()
    if name not in Settings.model_fields:
        nearest = meant.removeprefix("AD2KIT_").lower()
        said = refusal({}, {name: "1"}, ["serve", f"--arg={name}=1"])
        assert f"no argument '{name}' (did you mean '{nearest}'?)" in said
        assert f"no argument '{name}'" in refusal({}, {}, ["serve", f"--arg={name}=1"], packed=True)


def test_variables_of_others_are_left_alone() -> None:
    others = {
        "AD2KIT_BENCH_MODEL": "x",
        "AD2KIT_SERVER": "{}",
        "BENTOML_HOME": "x",
        # What Kubernetes gives to every pod beside a Service named ad2kit or ad2kit-demo.
        "AD2KIT_SERVICE_HOST": "10.0.0.1",
        "AD2KIT_SERVICE_PORT": "80",
        "AD2KIT_SERVICE_PORT_HTTP": "80",
        "AD2KIT_PORT": "tcp://10.0.0.1:80",
        "AD2KIT_PORT_80_TCP": "tcp://10.0.0.1:80",
        "AD2KIT_PORT_80_TCP_PROTO": "tcp",
        "AD2KIT_DEMO_SERVICE_HOST": "10.0.0.1",
        "AD2KIT_DEMO_PORT": "tcp://10.0.0.1:80",
        "AD2KIT_DEMO_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert read(others) == Settings()
    assert "has AD2KIT_PORT," in refusal({"AD2KIT_PORT": "3000"})


def test_a_bento_serves_the_model_that_it_holds() -> None:
    for name in ("model", "runs_dir"):
        said = refusal({f"AD2KIT_{name.upper()}": "/elsewhere"}, packed=True)
        assert "serves the model that it holds" in said
        assert f"unset AD2KIT_{name.upper()}" in said


def test_origins_are_listed_with_commas_between_them() -> None:
    assert Settings().origins() == []
    assert Settings(cors_origins="*").origins() == ["*"]
    assert Settings(cors_origins="https://a.example , http://[::1]:8080").origins() == [
        "https://a.example",
        "http://[::1]:8080",
    ]


def test_settings_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(UserError, match=r"shadow_share=0\.5 .* there is no shadow") as refused:
        Settings(shadow_share=0.5).check_they_fit()
    assert "AD2KIT_SHADOW=FOLDER" in refused.value.hint
    with pytest.raises(UserError, match=r"model names what is served, a, and runs_dir .* b"):
        Settings(model="a", runs_dir="b").check_they_fit()
    with pytest.raises(
        UserError, match=r"max_body_bytes=1048576 is more than max_held_bytes=2048"
    ) as refused:
        Settings(max_held_bytes=2048).check_they_fit()
    assert "raise AD2KIT_MAX_HELD_BYTES" in refused.value.hint
    for part, whole in (("max_texts", "max_queue_texts"), ("max_batch_tokens", "max_queue_tokens")):
        with pytest.raises(
            UserError, match=rf"{part}=9 is more than {whole}=8, the bound of the queue"
        ) as refused:
            settings_of(**{part: 9, whole: 8}).check_they_fit()
        assert f"raise AD2KIT_{whole.upper()}, or lower" in refused.value.hint
        settings_of(**{part: 8, whole: 8}).check_they_fit()
    Settings(shadow="a", shadow_share=0.5, model="b").check_they_fit()


def test_a_queue_that_cannot_hold_one_text_of_the_model_is_refused() -> None:
    windows = TextLength(64, "windows", 32, 3)
    settings_of(max_queue_tokens=64).check_model_fits(windows)
    with pytest.raises(UserError, match="max_queue_tokens=63: expected at least 64") as refused:
        settings_of(max_queue_tokens=63).check_model_fits(windows)
    assert "AD2KIT_MAX_QUEUE_TOKENS=64" in refused.value.hint


def test_other_paths_and_ports_are_taken() -> None:
    for path in ("/classify", "/classify/topics"):  # the second is the path of a model
        assert "expected a path such as /ad2kit" in refusal({"AD2KIT_ROOT_PATH": path})
    for path in ("/classify2", "/a/classify", "/..a", "/a..b"):
        assert read({"AD2KIT_ROOT_PATH": path}).root_path == path
    for origin in ("https://a.b:80", "http://a.b:443", "http://[::1]:8080", "http://a443"):
        assert read({"AD2KIT_CORS_ORIGINS": origin}).cors_origins == origin


def test_a_path_is_absolute_or_made_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read({"AD2KIT_SHADOW": "here"}).shadow == str(tmp_path / "here")
    said = refusal({"AD2KIT_SHADOW": "my folder"}, packed=True)
    assert "expected an absolute path" in said
    assert """AD2KIT_SHADOW="$PWD"/'my folder'""" in said


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        pytest.param(b"one\ntwo\n", ["one", "two"], id="a key a line"),
        pytest.param(b"\xef\xbb\xbfone\r\ntwo", ["one", "two"], id="byte order mark, Windows"),
        pytest.param(b"# of Ann\none\n\n \t\n  # of Bob\n two \n", ["one", "two"], id="comments"),
        pytest.param(b"one\rtwo\r", ["one", "two"], id="an old Mac"),
        pytest.param(b"a,b\nc#d\n", ["a,b", "c#d"], id="comma and number sign in a key"),
    ],
)
def test_keys_are_read_from_a_file(content: bytes, keys: list[str], tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(content)
    assert keys_of(tmp_path / "keys") == [("", key) for key in keys]
    assert list(Settings(api_keys_file=str(tmp_path / "keys")).keys()) == keys
    both = Settings(api_keys="x", api_keys_file=str(tmp_path / "keys"))
    assert list(both.keys()) == ["x", *keys]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"", "there is none", id="empty"),
        pytest.param(b" \r\n\t\n", "there is none", id="blank"),
        pytest.param(b"\xef\xbb\xbf", "there is none", id="byte order mark alone"),
        pytest.param(b"# nobody\n", "there is none", id="comments alone"),
        pytest.param(b"\0\0\0\0", "line 1: an API key consists of visible ASCII", id="zero bytes"),
        pytest.param(b"one\ntw\0o\n", "line 2: an API key consists", id="a zero byte"),
        pytest.param(b"\xff\xfeo\0n\0e\0", "cannot read the API keys", id="UTF-16"),
        pytest.param(b"\x80\x81secret", "cannot read the API keys", id="not UTF-8"),
        pytest.param(b"one two\n", "line 1: an API key", id="two in a line"),
        pytest.param("schl\u00fcssel\n".encode(), "line 1: an API key", id="not ASCII"),
        pytest.param(b": secret", "line 1: an API key consists", id="a blank name"),
        pytest.param(b"ann: ", "line 1: an API key consists", id="a name without a key"),
        pytest.param(b"ann: secret more", "line 1: an API key consists", id="two keys of a name"),
        pytest.param(b"a/b: secret", "a name of at most 64 letters", id="a wrong name"),
        pytest.param(b"x" * 65 + b": secret", "at most 64 letters", id="a long name"),
        pytest.param(b"a: k\nb: k", "two names, 'a' and 'b'", id="twice"),
        pytest.param(b"k\nb: k", "two names, '' and 'b'", id="with and without a name"),
    ],
)
def test_a_file_without_keys_opens_nothing(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(UserError, match=said) as refused:
        Settings(api_keys_file=str(tmp_path / "keys")).keys()
    assert refused.value.hint.startswith(("write one key", "give"))
    assert "secret" not in refused.value.message


def test_a_key_may_have_a_name(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ann: one\nann:\t 0123:x\nplain\n")
    settings = Settings(api_keys="bob-2: three, four", api_keys_file=str(tmp_path / "keys"))
    named = {"three": "bob-2", "four": "", "one": "ann", "0123:x": "ann", "plain": ""}
    assert settings.keys() == named
    # What a client sends is the key alone.
    assert client_key(tmp_path / "keys", {}) == "one"


@pytest.mark.parametrize("key", ["ann:0123456789abcdef", "a:1", ":a", "a:b:", "https://a:b"])
def test_a_key_that_holds_a_colon_is_one_key_and_has_no_name(key: str, tmp_path: Path) -> None:
    """Names are public in /metrics: no part of a key may become one."""
    (tmp_path / "keys").write_text(f"{key}\n")
    assert Settings(api_keys_file=str(tmp_path / "keys")).keys() == {key: ""}
    assert Settings(api_keys=key).keys() == {key: ""}


def test_what_is_no_file_opens_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in (
        (tmp_path, "a folder"),
        (tmp_path / "x", "absent"),
        (tmp_path / "pipe", "no file"),
    ):
        with pytest.raises(UserError, match=f"it is {kind}"):
            Settings(api_keys_file=str(path)).keys()


def test_keys_in_the_environment() -> None:
    assert Settings(api_keys=" one, two ,\n").keys() == {"one": "", "two": ""}
    assert Settings().keys() == {}
    for text in ("", ",", " , \n"):
        with pytest.raises(UserError, match="asked for and there is none"):
            Settings(api_keys=text).keys()
    for text in ("one\ntwo", "one, t w o"):
        with pytest.raises(UserError, match=r"AD2KIT_API_KEYS, key [12]: an API key consists"):
            Settings(api_keys=text).keys()
    assert "hunter2" not in repr(Settings(api_keys="hunter2"))


def test_a_client_sends_the_first_key_that_it_finds(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# old\none\ntwo\n")
    assert client_key(None, {}) is None
    assert client_key(None, {"AD2KIT_API_KEYS": "three,four"}) == "three"
    assert client_key(None, {"AD2KIT_API_KEYS_FILE": str(file)}) == "one"
    assert client_key(file, {"AD2KIT_API_KEYS": "three"}) == "one"
    with pytest.raises(UserError, match="there is none"):
        client_key(None, {"AD2KIT_API_KEYS": ""})
    with pytest.raises(UserError, match="it is absent"):
        client_key(tmp_path / "none", {})
