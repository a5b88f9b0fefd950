"""A finished store as a source of the mixture, and the command that looks at stores."""

from dataclasses import replace

import fsspec
import pytest
from tokens_cases import texts_of, write

from ipt.config import Config, MixtureConfig, SourceConfig, TokensConfig
from ipt.pipeline.stages import Stages
from ipt.tokens.__main__ import main
from ipt.tokens.source import open_source
from ipt.tokens.store import TokenStore
from ipt.tokens.tokenize import tokenize_texts


@pytest.fixture(scope="module")
def texts(make_texts):
    return make_texts(40)


@pytest.fixture(scope="module")
def folder(texts, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given") / "store"
    tokenize_texts(TokensConfig(shard_tokens=300, workers=1), texts, tiny_model, folder)
    return folder


def source(path) -> SourceConfig:
    return SourceConfig(path=str(path), kind="store")


def test_a_given_store_takes_the_place_of_a_stage(folder, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("IPT_CACHE", str(tmp_path))
    fsspec.filesystem("memory").put(f"{folder}/", "/given/", recursive=True)
    digests = set()
    for path in (str(folder), f"file://{folder}", "memory://given"):
        mixture = MixtureConfig(ratios={"given": 1.0}, sources={"given": source(path)})
        stages = Stages(
            Config(model=tiny_model, mixture=mixture, stages_dir=str(tmp_path / "stages"))
        )
        store = stages.store("given")
        assert store.folder == path and stages.done == {}
        assert (
            TokenStore.open(store.folder).tokens(3).tolist()
            == TokenStore(folder).tokens(3).tolist()
        )
        digests.add(store.digest)
    assert digests == {TokenStore(folder).digest}
    fsspec.filesystem("memory").rm("/given", recursive=True)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "name the folder or URL"),
        ("nowhere", "is not a token store"),
        ("abc://x", "Protocol not known"),
    ],
)
def test_what_is_no_store_is_named_with_its_key(tiny_model, path, said):
    with pytest.raises(
        (ValueError, FileNotFoundError), match=rf"mixture\.sources\.mine\.path={path}.*{said}"
    ) as caught:
        open_source("mine", source(path), tiny_model, 1)
    assert "\n" not in str(caught.value)


def test_a_store_of_another_tokenizer_is_named_before_training(tmp_path, tiny_model, encoding):
    folder = write(tmp_path, [[1, 2]], 5, "another")
    with pytest.raises(
        ValueError,
        match=r"mixture\.sources\.mine\.path=.* was made with tokenizer another, "
        rf".* is {encoding.fingerprint}",
    ):
        open_source("mine", source(folder), tiny_model, 1)


def test_show_prints_what_a_store_holds(folder, tiny_model, tokenizer, texts, capsys):
    main(["show", str(folder), "--document", "3", "--model", tiny_model])
    shown = capsys.readouterr().out
    store = TokenStore(folder)
    assert (
        f"documents    {len(store)}\n" in shown
        and f"tokens       {store.n_tokens:,}\n" in shown
        and store.fingerprint in shown
    )
    assert shown.endswith(f"{texts_of(texts)[3]}{tokenizer.eos_token}\n")
    main(["show", str(folder), "--document", "3"])
    assert capsys.readouterr().out.endswith(" ".join(map(str, store.tokens(3).tolist())) + "\n")


def test_verify_names_what_is_damaged(folder, tmp_path, capsys):
    main(["verify", str(folder)])
    assert "all as they were written" in capsys.readouterr().out
    copy = write(tmp_path, [[1, 2], [3, 4]], 2)
    (copy / "shard-00001/tokens.bin").write_bytes(b"12345678")
    with pytest.raises(SystemExit):
        main(["verify", str(copy)])
    assert "error: " in (error := capsys.readouterr().err) and "shard-00001/tokens.bin" in error


def test_add_makes_the_store_that_a_run_makes(folder, texts, tiny_model, tmp_path, capsys):
    main(
        [
            "add",
            str(tmp_path / "store"),
            str(texts),
            "--model",
            tiny_model,
            "--shard-tokens",
            "300",
            "--workers",
            "1",
        ]
    )
    assert "40 documents" in capsys.readouterr().out
    assert TokenStore(tmp_path / "store").digest == TokenStore(folder).digest


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "nowhere"], "is not a token store"),
        (["show", "{folder}", "--document", "40"], "there is no document 40"),
        (["add", "s3://bucket/store", "{texts}", "--model", "{model}"], "on this machine"),
        (
            ["add", "{folder}/new", "{texts}", "--model", "{model}", "--workers", "0"],
            "tokens.workers=0",
        ),
    ],
)
def test_mistakes_are_one_line(folder, texts, tiny_model, capsys, arguments, said):
    with pytest.raises(SystemExit) as caught:
        main(
            [
                argument.format(folder=folder, texts=texts, model=tiny_model)
                for argument in arguments
            ]
        )
    error = capsys.readouterr().err
    assert caught.value.code == 1 and said in error and error.count("\n") == 1


def test_the_stage_is_the_same_for_any_number_of_workers(make_texts, tiny_model, tmp_path):
    config = Config(
        model=tiny_model,
        stages_dir=str(tmp_path / "stages"),
        mixture=MixtureConfig(
            ratios={"mine": 1.0}, sources={"mine": SourceConfig(path=str(make_texts(30)))}
        ),
        tokens=TokensConfig(workers=1),
    )
    first = Stages(config).store("mine")
    again = Stages(replace(config, tokens=TokensConfig(workers=2, cache_gib=1.0))).store("mine")
    assert first.folder == again.folder and again.reused
