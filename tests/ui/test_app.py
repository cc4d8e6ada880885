"""The page: light, local, and back where it was after it is loaded again."""

import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from studio.errors import DataError, OutputError, SpecError, UsageError
from studio.jobs import JobStore
from studio.png import Facts, write_png
from studio.registry import MODIFIERS
from studio.specs import AdapterUse, Event, GenerateSpec, parse_spec
from studio.specs.composing import CompareSpec, PlanSpec
from studio.ui.app import _draw_with, build, serve
from studio.ui.follow import Follower
from studio.ui.generate_tab import GenerateTab
from studio.ui.pictures import captioned, clean_uploads, keep_uploads
from studio.ui.train_tab import TrainTab, used_together
from studio.workspace import Workspace, workspace


def quiet() -> str:
    return ""


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return workspace(tmp_path / "home")


@pytest.fixture
def train(space: Workspace) -> TrainTab:
    tab = TrainTab(space, Follower(JobStore(space.database)), quiet)
    with gr.Blocks():
        tab.layout()
    return tab


@pytest.fixture
def generate(space: Workspace) -> GenerateTab:
    tab = GenerateTab(space, Follower(JobStore(space.database)), quiet)
    with gr.Blocks():
        tab.layout()
    return tab


def filled(tab: Any, **changed: Any) -> list[Any]:
    modifiers = (
        [component.value for component in tab.modifiers.components] if hasattr(tab, "modifiers") else []
    )
    return modifiers + [changed.get(field.name, field.component.value) for field in tab.form.fields]


def weights(*given: float) -> list[float]:
    return [*given, *([1.0] * (8 - len(given)))]


def test_the_page_tells_nobody_about_itself(tmp_path: Path) -> None:
    assert build(tmp_path).analytics_enabled is False


def test_only_this_machine_is_served(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"host must be one of .* got '0\.0\.0\.0'"):
        serve("0.0.0.0", home=tmp_path)


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the page of ``tmp_path / "home"`` from a thread; its worker is not needed and not started."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setattr("studio.ui.app.Supervisor.start", lambda _: None)
    (tmp_path / "secret.txt").write_text("secret")
    ready: queue.Queue[str] = queue.Queue()
    over = threading.Event()
    arguments = {"port": 0, "home": tmp_path / "home", "on_ready": ready.put, "until": over}
    page = threading.Thread(target=serve, kwargs=arguments)
    page.start()
    yield ready.get(timeout=60)
    over.set()
    page.join()


def test_ctrl_c_ends_the_page_and_says_what_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setattr("studio.ui.app.Supervisor.start", lambda _: None)
    serve(port=0, home=tmp_path, on_ready=lambda _: None, until=Interrupted())
    assert "a job that runs is stopped safely first" in caplog.text


def test_files_outside_the_workspace_and_the_queue_itself_are_not_served(
    address: str, tmp_path: Path
) -> None:
    (tmp_path / "home" / "adapters" / "dog.txt").write_text("bark")

    def fetch(path: Path) -> int:
        try:
            with urllib.request.urlopen(f"{address}gradio_api/file={path}") as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert fetch(tmp_path / "home" / "adapters" / "dog.txt") == 200
    refused = [tmp_path / "secret.txt", tmp_path / "home" / "jobs.sqlite", Path("/etc/passwd")]
    assert [fetch(path) for path in refused] == [403, 403, 403]


def test_the_training_form_becomes_a_job_in_the_workspace(train: TrainTab, space: Workspace) -> None:
    folder = space.uploads / "set"
    folder.mkdir()
    request = train.request(str(folder), "dog", *filled(train, steps=9))
    assert request["output"] == str(space.adapters / "dog.safetensors")
    assert (request["data"], request["steps"]) == (str(folder), 9)


def test_a_taken_adapter_name_gets_a_number(train: TrainTab, space: Workspace) -> None:
    request = train.request(str(space.uploads), "dog", *filled(train))
    train.follower.store.submit("train", request)
    (space.adapters / "dog-2.safetensors").write_bytes(b"")
    (space.adapters / "dog-3-run").mkdir()
    again = train.request(str(space.uploads), "dog", *filled(train))
    assert again["output"] == str(space.adapters / "dog-4.safetensors")


def test_a_training_that_ended_early_keeps_its_name_for_a_retry(train: TrainTab, space: Workspace) -> None:
    store = train.follower.store
    first = train.request(str(space.uploads), "dog", *filled(train))
    assert not {"overwrite", "resume"} & set(first), "a first attempt replaces nothing"
    store.submit("train", first)
    store.claim("a")
    store.fail(1, "broken")
    assert train.request(str(space.uploads), "dog", *filled(train))["output"].endswith("dog-2.safetensors")
    assert store.retry(1).spec["output"] == first["output"]


@pytest.mark.parametrize("name", ["../dog", "a/b", "", "/etc/x", "..", "a\\b"])
def test_an_adapter_name_cannot_lead_out_of_its_folder(train: TrainTab, space: Workspace, name: str) -> None:
    with pytest.raises(UsageError, match="name of the adapter"):
        train.request(str(space.uploads), name, *filled(train))


def test_training_refuses_pictures_from_outside_and_none_at_all(train: TrainTab, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="outside the workspace"):
        train.request(str(tmp_path), "dog", *filled(train))
    with pytest.raises(DataError, match="Drop some first"):
        train.request(None, "dog", *filled(train))


def test_wrong_options_are_refused_before_anything_is_queued(train: TrainTab, space: Workspace) -> None:
    with pytest.raises(SpecError, match="steps: Input should be greater than or equal to 1"):
        train.request(str(space.uploads), "dog", *filled(train, steps=0))


def test_a_page_loaded_again_shows_the_newest_training(train: TrainTab, space: Workspace) -> None:
    folder = space.uploads / "set"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    train.follower.store.submit(
        "train", train.request(str(folder), "dog", *filled(train, prompt="a sks dog"))
    )
    shown = dict(zip([id(output) for output in train.restored], train.restore(), strict=True))
    prompt = next(field.component for field in train.form.fields if field.name == "prompt")
    assert shown[id(train.folder)] == str(folder)
    assert shown[id(train.gallery)] == [(str(folder / "a.png"), "")]
    assert shown[id(train.name)] == "dog"
    assert shown[id(prompt)]["value"] == "a sks dog"
    assert 'data-state="queued"' in shown[id(train.panel.parts["status"].component)]


def test_a_part_is_sent_again_only_when_it_changed(train: TrainTab, space: Workspace) -> None:
    store = train.follower.store
    store.submit("train", train.request(str(space.uploads), "dog", *filled(train)))
    marks, *_ = train.panel.refresh({})
    _, *same = train.panel.refresh(marks)
    assert all(update == gr.skip() for update in same)
    store.cancel(1)
    _, *changed = train.panel.refresh(marks)
    names = [name for name, update in zip(train.panel.parts, changed, strict=True) if update != gr.skip()]
    assert names == ["stop", "again", "status"]


def test_answers_that_overtake_each_other_are_mended_by_the_next(train: TrainTab, space: Workspace) -> None:
    """The clock's answer about the end of a job may be shown before the one to the click that began it."""
    idle, *_ = train.panel.refresh({})
    store = train.follower.store
    store.submit("train", train.request(str(space.uploads), "dog", *filled(train)))
    late, *_ = train.panel.refresh(idle)
    store.cancel(1)
    ended, *updates = train.panel.refresh(late)
    names = [name for name, update in zip(train.panel.parts, updates, strict=True) if update != gr.skip()]
    assert {"stop", "status"} <= set(names)
    unmoved, *_ = train.panel.refresh(ended)
    assert unmoved == gr.skip(), "marks that say nothing new replace none"
    _, *missed = train.panel.refresh(idle)
    stop = dict(zip(train.panel.parts, missed, strict=True))["stop"]
    assert stop["interactive"] is False, "idle before and after, but not in between"


PARTS = {"lora": ("token",), "b-lora": ("content", "style"), "dora": ()}


@pytest.mark.parametrize(
    ("method", "together"), [("lora", ("", "-token")), ("b-lora", ("",)), ("dora", ("",))]
)
def test_all_files_of_a_training_are_offered_and_those_that_belong_together_are_drawn_with(
    train: TrainTab, generate: GenerateTab, space: Workspace, method: str, together: tuple[str, ...]
) -> None:
    store = train.follower.store
    number = store.submit("train", {"base": "starter", "method": method, "prompt": "a sks dog"})
    store.claim("a")

    def save(stem: str) -> list[str]:
        names = [stem, *(f"{stem}-{part}" for part in PARTS[method])]
        paths = [space.adapters / f"{name}.safetensors" for name in names]
        for path, part in zip(paths, ("", *PARTS[method]), strict=True):
            path.write_bytes(b"")
            store.report(number, Event(kind="saved", path=path, part=part))
        return [str(path) for path in paths]

    def offered() -> tuple[Any, Any]:
        _, *updates = train.panel.refresh({})
        parts = dict(zip(train.panel.parts, updates, strict=True))
        assert parts["use"]["interactive"] == parts["download"]["visible"]
        return parts["download"]["value"], used_together(train.follower.latest("train"))

    on_the_way = save("dog-last-good-000003")
    assert offered() == (None, []), "not while it runs"
    store.fail(number, "the loss is no longer finite")
    assert offered()[0] == on_the_way
    store.retry(number)
    store.claim("a")
    assert offered() == (None, [])
    files = save("dog")
    store.cancel(number)
    store.finish(number)
    used = [space.adapters / f"dog{part}.safetensors" for part in together]
    assert offered() == (files, used)
    outputs = [None, *generate.request_outputs]
    shown = dict(zip(map(id, outputs), _draw_with(train.follower, generate), strict=True))
    assert shown[id(generate.chosen)]["value"] == [path.name for path in used]
    used[0].unlink()
    assert offered() == (None, []), "parts are nothing without what they are parts of"


def test_the_chosen_method_is_explained(generate: GenerateTab, train: TrainTab) -> None:
    about = generate.form._about
    assert about.value.startswith("Add the adapters")
    assert train.form._about.value.startswith("Learn low-rank matrices")
    assert generate.form._described("klora").startswith("Let one adapter act on each layer")


def test_nothing_empty_is_shown_before_there_is_something(train: TrainTab) -> None:
    hidden = {"losses", "pictures"}
    _, *updates = train.panel.refresh({})
    shown = dict(zip(train.panel.parts, updates, strict=True))
    assert [shown[name]["visible"] for name in hidden] == [False, False]


def test_new_adapters_appear_in_the_list_by_themselves(generate: GenerateTab, space: Workspace) -> None:
    marks, *_ = generate.panel.refresh({})
    (space.adapters / "dog.safetensors").write_bytes(b"")
    _, *updates = generate.panel.refresh(marks)
    offered = dict(zip(generate.panel.parts, updates, strict=True))["adapters"]
    assert offered["choices"] == ["dog.safetensors"]


def test_adapters_and_weights_reach_the_specification(generate: GenerateTab, space: Workspace) -> None:
    for name in ("a", "b"):
        (space.adapters / f"{name}.safetensors").write_bytes(b"")
    chosen = ["b.safetensors", "a.safetensors"]
    request = generate.request({}, chosen, *weights(0.5, -0.25), *filled(generate))
    assert request["adapters"] == [
        {"path": str(space.adapters / "b.safetensors"), "weight": 0.5},
        {"path": str(space.adapters / "a.safetensors"), "weight": -0.25},
    ]
    assert Path(request["output"]).parent == space.pictures


@pytest.mark.parametrize("name", ["gone.safetensors", "../../secret.safetensors"])
def test_an_adapter_that_is_not_in_the_workspace_is_refused(generate: GenerateTab, name: str) -> None:
    with pytest.raises((UsageError, OutputError), match=r"there is no|outside the workspace"):
        generate.request({}, [name], *weights(), *filled(generate))


def test_the_hashes_of_a_restored_picture_go_along_with_the_request(
    generate: GenerateTab, space: Workspace, tmp_path: Path
) -> None:
    adapter = space.adapters / "dog.safetensors"
    adapter.write_bytes(b"")
    spec = GenerateSpec(prompt="a sks dog", seed=8, adapters=(AdapterUse(path=adapter, weight=0.5),))
    facts = Facts(8, 8, model_hash="ab" * 32, adapter_hashes={"dog": "cd" * 32})
    write_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", spec, facts)

    message, *updates = generate._restore(str(tmp_path / "a.png"))
    assert "Settings of a.png restored." in message
    shown = dict(zip([id(output) for output in generate.request_outputs], updates, strict=True))
    expected = shown[id(generate.expected)]
    assert expected == {"starter": "ab" * 32, str(adapter): "cd" * 32}
    request = generate.request(expected, ["dog.safetensors"], *weights(0.5), *filled(generate))
    assert parse_spec(GenerateSpec, request).expected_hashes == expected
    shown = dict(
        zip([id(output) for output in generate.request_outputs], generate.show(request), strict=True)
    )
    assert shown[id(generate.expected)] == expected
    assert generate.use([adapter], "a fox", "starter")[0] == {}


def shown(outputs: list[Any], updates: list[Any]) -> list[Any]:
    """Return what components hold after updates."""
    return [
        component.value if update == gr.skip() else update["value"] if isinstance(update, dict) else update
        for component, update in zip(outputs, updates, strict=True)
    ]


def test_modifiers_reach_the_request_and_come_back_from_a_saved_composition(
    generate: GenerateTab, space: Workspace
) -> None:
    request = generate.request({}, [], *weights(), *filled(generate))
    assert request["modifiers"] == {}
    asked = {
        "cache": {"interval": 5},
        "schedule": {"weights": {"dog": "0@0 1@0.5"}},
        "pin": {"adapters": ["a", "b"]},
    }
    values = shown(generate.modifiers.components, generate.modifiers.write(asked))
    read = generate.modifiers.read(values)
    assert read["schedule"] == asked["schedule"] and read["pin"] == asked["pin"]
    assert read["cache"]["interval"] == 5 and set(read) == set(asked)

    form = filled(generate, method="switch", switch_every=3)[len(values) :]
    saved, message = generate._save({}, [], *weights(), *values, *form)
    assert "Wrote switch" in message
    (file,) = space.adapters.glob("*.toml")
    assert saved["value"] == str(file)
    message, *updates = generate._restore(str(file))
    assert "restored" in message
    outputs = dict(zip(map(id, generate.request_outputs), updates, strict=True))
    components = generate.modifiers.components
    back = shown(components, [outputs[id(component)] for component in components])
    assert generate.modifiers.read(back) == read
    method = next(field.component for field in generate.form.fields if field.name == "method")
    assert outputs[id(method)]["value"] == "switch"


def test_every_modifier_of_the_registry_has_a_box_and_fields(generate: GenerateTab) -> None:
    assert list(generate.modifiers.boxes) == MODIFIERS.names()
    for name in MODIFIERS:
        options = [field.name for field in generate.modifiers.fields[name]]
        assert options == list(MODIFIERS[name].Options.model_fields)


def test_an_adapter_keeps_its_weight_when_another_is_taken_off(generate: GenerateTab) -> None:
    names, first, second, *_ = generate._choose(["b"], ["a", "b"], *weights(0.2, 0.7))
    assert names == ["b"]
    assert (first["value"], first["visible"], second["visible"]) == (0.7, True, False)


def test_dropped_files_are_copied_into_a_set_of_their_own(space: Workspace, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a sks dog\n")
    first = keep_uploads(space, [tmp_path / "a.png", tmp_path / "a.txt"])
    second = keep_uploads(space, [tmp_path / "a.png"])
    assert first != second and first.parent == second.parent == space.uploads
    assert captioned(first) == [(str(first / "a.png"), "a sks dog")]


@pytest.fixture
def uploads(space: Workspace) -> dict[str, Path]:
    """Return places below the uploads, all of them very old."""
    outside = space.root.parent / "outside"
    places = {name: space.uploads / name for name in ("set-a", "set-b", "set-c", "example-robot", "mine")}
    places |= {"hash": space.cache / "hash", "outside": outside}
    for place in places.values():
        place.mkdir(parents=True)
        (place / "a.png").write_bytes(b"")
    places |= {"link": space.uploads / "set-link", "file": space.cache / "file.png"}
    places["link"].symlink_to(outside)
    places["file"].write_bytes(b"")
    for place in places.values():
        os.utime(place, (0, 0), follow_symlinks=False)
    return places


def test_old_uploads_are_removed_and_nothing_else(space: Workspace, uploads: dict[str, Path]) -> None:
    os.utime(uploads["set-c"])
    removed = clean_uploads(space, in_use=[uploads["set-b"]])
    assert sorted(removed) == sorted(uploads[name] for name in ("set-a", "hash", "link", "file"))
    assert not any(os.path.lexists(place) for place in removed)
    kept = ("set-b", "set-c", "example-robot", "mine", "outside")
    assert all((uploads[name] / "a.png").is_file() for name in kept)


def test_uploads_that_lie_outside_the_workspace_are_left_alone(
    space: Workspace, uploads: dict[str, Path], tmp_path: Path
) -> None:
    space.uploads.rename(tmp_path / "elsewhere")
    space.uploads.symlink_to(tmp_path / "elsewhere")
    assert clean_uploads(space, in_use=[]) == []
    assert (tmp_path / "elsewhere" / "set-a" / "a.png").is_file()


def test_the_page_removes_old_uploads_but_those_of_the_newest_and_the_waiting_training_when_it_starts(
    space: Workspace, uploads: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(space.database)
    waiting, done, newest = (
        store.submit("train", {"data": uploads[name]}) for name in ("set-a", "set-b", "set-c")
    )
    store.cancel(done)
    store.cancel(newest)
    monkeypatch.setattr("studio.ui.app._launch", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        serve(home=space.root)
    assert [uploads[name].exists() for name in ("set-a", "set-b", "set-c", "hash")] == [
        True,
        False,
        True,
        False,
    ]
    assert store.get(waiting).active


def test_dropped_files_that_clash_or_show_nothing_are_refused(space: Workspace, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"two files are named a\.png"):
        keep_uploads(space, [tmp_path / "x" / "a.png", tmp_path / "y" / "a.png"])
    with pytest.raises(DataError, match="none of 1 files is a picture"):
        keep_uploads(space, [tmp_path / "notes.txt"])


def test_the_plan_of_what_the_form_composes_can_be_asked_for(generate: GenerateTab, space: Workspace) -> None:
    for name in ("a", "b"):
        (space.adapters / f"{name}.safetensors").write_bytes(b"")
    fields = filled(generate, method="switch", switch_every=3, steps=12, prompt="a fox <lora:b:0.5>")
    request = generate.request({}, ["a.safetensors"], *weights(0.25), *fields)
    asked = generate.plan.asked(request)
    spec = parse_spec(PlanSpec, asked)
    assert [(use.path.name, use.weight) for use in spec.adapters] == [
        ("a.safetensors", 0.25),
        ("b.safetensors", 0.5),
    ]
    assert (spec.method, spec.steps, spec.prompt, spec.measure) == ("switch", 12, "a fox", True)
    assert spec.options.switch_every == 3  # type: ignore[attr-defined]
    assert spec.picture is not None and spec.picture.is_relative_to(space.pictures)
    number = generate.follower.store.submit("plan", asked)
    spec.picture.parent.mkdir()
    Image.new("RGB", (8, 8)).save(spec.picture)
    assert generate.plan._drawn(generate.follower.latest("plan")) == "", "not before the job has ended"
    generate.follower.store.claim("a")
    generate.follower.store.finish(number, "a")
    _, *updates = generate.plan.panel.refresh({})
    shown = dict(zip(generate.plan.panel.parts, updates, strict=True))["picture"]
    assert (shown["value"], shown["visible"]) == (str(spec.picture), True)


def test_methods_are_compared_on_what_the_form_composes(generate: GenerateTab, space: Workspace) -> None:
    (space.adapters / "a.safetensors").write_bytes(b"")
    fields = filled(generate, method="switch", switch_every=3, steps=12, seed=5, count=2, prompt="a fox")
    request = generate.request({}, ["a.safetensors"], *weights(0.25), *fields)
    spec = parse_spec(CompareSpec, generate.compare.asked(request, ["switch", "merge"]))
    assert (spec.methods, spec.seeds, spec.prompt, spec.steps) == (("switch", "merge"), (5, 6), "a fox", 12)
    assert list(spec.method_options) == ["switch"]
    assert spec.method_options["switch"].switch_every == 3  # type: ignore[attr-defined]
    assert [use.weight for use in spec.adapters] == [0.25] and spec.grid.is_relative_to(space.pictures)
    others = parse_spec(CompareSpec, generate.compare.asked(request, ["merge"]))
    assert others.method_options == {}
    with pytest.raises(UsageError, match="choose at least one"):
        generate.compare.asked(request, [])
