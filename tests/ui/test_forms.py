"""Forms follow the specifications."""

from typing import Any, Literal, get_args, get_origin

import gradio as gr
import pytest

from studio.errors import SpecError
from studio.registry import MERGERS
from studio.specs import GenerateSpec, TrainSpec, parse_spec
from studio.specs.base import alternatives
from studio.ui.forms import Form, label


def whole_form(spec_type: Any, **start: Any) -> Form:
    form = Form(spec_type, start)
    with gr.Blocks():
        form.add("method")
        form.add_options()
        form.add_rest(leave_out=[])
        form.follow_method()
    return form


def values(form: Form, **changed: Any) -> list[Any]:
    return [changed.get(field.name, field.component.value) for field in form.fields]


REQUIRED: dict[Any, dict[str, str]] = {
    TrainSpec: {"data": "pictures", "output": "dog.safetensors"},
    GenerateSpec: {"prompt": "a dog"},
}


@pytest.mark.parametrize("spec_type", [TrainSpec, GenerateSpec])
def test_every_field_has_a_component_with_its_description(spec_type: Any) -> None:
    form = whole_form(spec_type)
    shown = {field.name: field.component for field in form.fields if field.method is None}
    assert set(spec_type.model_fields) - set(shown) <= {"options", "adapters", "modifiers"}
    for name, component in shown.items():
        assert component.info == spec_type.model_fields[name].description


@pytest.mark.parametrize("spec_type", [TrainSpec, GenerateSpec])
def test_an_untouched_form_is_the_specification_with_its_defaults(spec_type: Any) -> None:
    form = whole_form(spec_type)
    required = REQUIRED[spec_type]
    assert parse_spec(spec_type, form.read(values(form, **required))) == parse_spec(spec_type, required)


@pytest.mark.parametrize("spec_type", [TrainSpec, GenerateSpec])
def test_every_method_of_the_registry_can_be_chosen_with_its_own_options(spec_type: Any) -> None:
    form = whole_form(spec_type)
    for method in spec_type.registry.names():
        request = form.read(values(form, method=method, **REQUIRED[spec_type]))
        options = spec_type.registry[method].Options.model_fields
        required = {name for name, field in options.items() if field.is_required()}
        assert set(options) - required <= set(request)
        if required:
            with pytest.raises(SpecError) as caught:
                parse_spec(spec_type, request)
            assert set(caught.value.problems) == {f"{name}: is required." for name in required}
        else:
            assert parse_spec(spec_type, request).method == method


def test_what_the_user_changes_reaches_the_specification() -> None:
    form = whole_form(TrainSpec)
    changed: dict[str, Any] = {
        **REQUIRED[TrainSpec], "steps": 7, "learning_rate": 5e-4, "rank": 3, "flip": True,
        "schedule": "linear", "resolution": "128", "sample_prompts": "a dog\n\n a cat ", "min_snr_gamma": "",
    }  # fmt: skip
    spec = parse_spec(TrainSpec, form.read(values(form, **changed)))
    assert (spec.steps, spec.learning_rate, spec.flip, spec.schedule) == (7, 5e-4, True, "linear")
    assert (spec.resolution, spec.sample_prompts, spec.min_snr_gamma) == (128, ("a dog", "a cat"), None)
    assert spec.options.rank == 3  # type: ignore[attr-defined]


def headings_of(form: Form, name: str) -> list[str]:
    """Return the headings that a field is folded up under, the nearest first."""
    component = next(field.component for field in form.fields if field.name == name)
    found = []
    while component := component.parent:
        if isinstance(component, gr.Accordion):
            found.append(component.label)
    return found


def test_fields_are_folded_up_by_group_and_a_new_one_is_not_lost() -> None:
    class Wider(TrainSpec):
        shade: int = 3

    form = whole_form(Wider)
    assert headings_of(form, "flip") == ["Pictures"] and headings_of(form, "loss") == ["Loss"]
    assert headings_of(form, "shade") == ["Other options"]
    assert headings_of(whole_form(GenerateSpec), "seed") == [], "a single group needs no heading"


def test_a_table_is_written_line_by_line() -> None:
    form = whole_form(GenerateSpec)
    table = next(field for field in form.fields if field.name == "expected_hashes")
    hashes = {"starter": "ab", "a=b.safetensors": "cd"}
    assert table.write(hashes) == "starter = ab\na=b.safetensors = cd"
    assert table.read(" starter =ab\n\n a=b.safetensors = cd") == hashes
    assert table.read("starter") == {"starter": ""} and table.read("") == {}
    ranks = next(field for field in whole_form(TrainSpec).fields if field.name == "block_ranks")
    request = REQUIRED[TrainSpec] | {"block_ranks": ranks.read("up_blocks.1 = 4\ndown_blocks")}
    with pytest.raises(SpecError, match=r"block_ranks\.down_blocks: Input should be a valid integer"):
        parse_spec(TrainSpec, request)


def test_wrong_values_are_reported_by_the_specification_not_corrected() -> None:
    form = whole_form(TrainSpec)
    request = form.read(values(form, **REQUIRED[TrainSpec], steps=2.5, rank=0, resolution="big"))
    with pytest.raises(SpecError) as caught:
        parse_spec(TrainSpec, request)
    assert {problem.split(":")[0] for problem in caught.value.problems} == {"steps", "resolution", "rank"}


def test_a_required_field_left_empty_is_said_to_be_required() -> None:
    form = whole_form(GenerateSpec)
    with pytest.raises(SpecError, match="prompt: is required"):
        parse_spec(GenerateSpec, form.read(values(form, prompt="")))


def test_writing_a_request_and_reading_it_back_gives_the_same() -> None:
    form = whole_form(TrainSpec)
    request = {
        **REQUIRED[TrainSpec], "method": "lora", "rank": 5, "resolution": 256, "min_snr_gamma": None,
        "seed": 4, "sample_prompts": ["a", "b"],
    }  # fmt: skip
    shown = [
        update.get("value", field.component.value)
        for field, update in zip(form.fields, form.write(request), strict=True)
    ]
    assert parse_spec(TrainSpec, form.read(shown)) == parse_spec(TrainSpec, request)


def test_start_values_stand_in_the_form_when_it_opens() -> None:
    form = whole_form(TrainSpec, steps=123, rank=2, prompt="a dog")
    request = form.read(values(form, **REQUIRED[TrainSpec]))
    assert (request["steps"], request["rank"], request["prompt"]) == (123, 2, "a dog")


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("min_snr_gamma", "Min SNR gamma"),
        ("steps", "Steps"),
        ("max_grad_norm", "Max gradient norm"),
        ("rslora", "rsLoRA"),
    ],
)
def test_labels_are_words(name: str, written: str) -> None:
    assert label(name) == written


def test_every_choice_of_a_method_is_a_drop_down() -> None:
    form = whole_form(GenerateSpec)
    offered = {
        (field.method, field.name): [value for _, value in field.component.choices]
        for field in form.fields
        if isinstance(field.component, gr.Dropdown)
    }
    for method in GenerateSpec.registry.names():
        for name, field in GenerateSpec.registry[method].Options.model_fields.items():
            kinds = alternatives(field.annotation)
            words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
            if words:
                assert [value for value in offered[method, name] if value] == words
    assert offered["merge", "how"] == MERGERS.names()
