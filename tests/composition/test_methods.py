"""Plans of the composition methods, without a model."""

import math

import pytest

from studio.composition.methods.merge import Merge
from studio.composition.methods.switch import Switch
from studio.composition.modifiers.pin import Pin
from studio.composition.plan import Branch, PlanRow, Step, covers
from studio.errors import CompositionError, SpecError, UsageError
from studio.registry import COMPOSERS
from studio.specs import GenerateSpec, Options, known_fields, parse_spec


def names(count: int) -> dict[str, None]:
    return dict.fromkeys("abcdefgh"[:count])


def weights(count: int) -> dict[str, float]:
    return {name: 0.5 + index / 10 for index, name in enumerate(names(count))}


def switch(count: int, **options: object) -> object:
    return Switch(Switch.Options(**options)).prepare(names(count), weights(count))


def test_every_option_has_a_description_and_a_name_of_its_own() -> None:
    taken = set(GenerateSpec.model_fields)
    for method in COMPOSERS:
        options = COMPOSERS[method].Options
        assert issubclass(options, Options)
        for name, field in options.model_fields.items():
            assert field.description, f"{method}.{name}"
            assert name not in taken, f"{method}.{name}"


def test_a_specification_takes_the_options_of_its_method() -> None:
    spec = parse_spec(GenerateSpec, {"prompt": "x", "method": "switch", "switch-every": 3, "order": "b, a"})
    assert spec.options == Switch.Options(switch_every=3, order=("b", "a"))
    assert "text_encoder_policy" in known_fields(GenerateSpec, "switch")
    with pytest.raises(SpecError, match="greater than or equal to 1"):
        parse_spec(GenerateSpec, {"prompt": "x", "method": "switch", "switch_every": 0})


def test_options_of_another_method_are_not_taken_for_defaults() -> None:
    with pytest.raises(UsageError, match=r"Switch takes Switch.Options\(...\), got Options"):
        Switch(Merge.Options())
    with pytest.raises(UsageError, match=r"Pin takes Pin.Options\(...\), got dict"):
        Pin({"adapters": ["a"]})


def test_merge_gives_every_adapter_its_weight_at_every_step() -> None:
    plan = Merge().prepare(names(3), weights(3))
    assert plan.constant
    assert plan.text_weights == weights(3)
    assert plan.at(Step(7, 9, 0.7)) == (Branch(weights(3)),)
    assert plan.describe(2) == [PlanRow(name, (weight, weight)) for name, weight in weights(3).items()]


@pytest.mark.parametrize("total", (1, 5, 6, 25, 100), ids="T{}".format)
@pytest.mark.parametrize("tau", (1, 2, 5, 7), ids="tau{}".format)
@pytest.mark.parametrize("count", (1, 2, 3, 5), ids="k{}".format)
def test_switch_follows_the_formula_of_the_paper(total: int, tau: int, count: int) -> None:
    plan = switch(count, switch_every=tau)
    for t in range(1, total + 1):
        i = math.floor(((t - 1) % (count * tau)) / tau) + 1  # arXiv:2402.16843, Sec. 3.1
        name = list(names(count))[i - 1]
        assert plan.at(Step(t - 1, total, (t - 1) / total)) == (Branch({name: weights(count)[name]}),)


def test_switch_gives_the_first_adapter_no_extra_step() -> None:
    plan = switch(2, switch_every=3)
    assert [plan.active(Step(index, 7, index / 7)) for index in range(7)] == list("aaabbba")


def test_switch_takes_turns_in_the_given_order() -> None:
    rows = switch(3, switch_every=1, order=("c", "a", "b")).describe(4)
    assert rows == [
        PlanRow("c", (0.7, 0.0, 0.0, 0.7)),
        PlanRow("a", (0.0, 0.5, 0.0, 0.0)),
        PlanRow("b", (0.0, 0.0, 0.6, 0.0)),
    ]


@pytest.mark.parametrize(
    ("policy", "spoken"), [("base", {}), ("first", {"b": 0.6}), ("merged", {"b": 0.6, "a": 0.5})], ids=str
)
def test_switch_encodes_the_prompt_by_its_policy(policy: str, spoken: dict[str, float]) -> None:
    assert switch(2, order=("b", "a"), text_encoder_policy=policy).text_weights == spoken


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        (("a", "b"), "adapter 'c' is missing"),
        (("a", "b", "c", "x"), "unknown adapter 'x'"),
        (("a", "b", "c", "a"), "adapter 'a' is named more than once"),
    ],
    ids=["missing", "unknown", "repeated"],
)
def test_switch_refuses_an_order_that_is_not_all_adapters_once(order: tuple[str, ...], problem: str) -> None:
    with pytest.raises(CompositionError, match=problem):
        switch(3, order=order)


def test_switch_refuses_no_adapters() -> None:
    with pytest.raises(CompositionError, match="got no adapters"):
        switch(0)


@pytest.mark.parametrize(("total", "tau", "count"), [(5, 5, 2), (10, 5, 3), (3, 40, 2)])
def test_switch_says_how_far_to_lower_its_period_when_an_adapter_would_never_act(
    total: int, tau: int, count: int
) -> None:
    with pytest.raises(CompositionError, match=r"never have a turn. Lower switch_every to at most") as raised:
        switch(count, switch_every=tau).check(total)
    lower = int(str(raised.value).split("at most ")[1].split()[0])
    switch(count, switch_every=lower).check(total)
    with pytest.raises(CompositionError):
        switch(count, switch_every=lower + 1).check(total)
    longer = int(str(raised.value).split("more than ")[1].split()[0])
    switch(count, switch_every=tau).check(longer + 1)
    with pytest.raises(CompositionError):
        switch(count, switch_every=tau).check(longer)


def test_switch_with_fewer_steps_than_adapters_names_the_steps_it_needs() -> None:
    with pytest.raises(CompositionError, match="Take at least 3 steps and switch_every=1"):
        switch(3, switch_every=1).check(2)


def test_switch_with_one_adapter_suits_any_number_of_steps() -> None:
    switch(1, switch_every=50).check(1)


@pytest.mark.parametrize(
    ("count", "ranges", "acting"),
    [
        (2, {"a": "0-0.5"}, "aabbaabbaabbbbbbbbbb"),
        # A turn ends with the range, and the next one is of whoever comes next in the order.
        (2, {"a": [0, 0.35], "b": "0.25 - 1"}, "aaaaaabbbbbbbbbbbbbb"),
        (3, {"b": (0.5, 1), "c": "0-0.7"}, "aaccaaccaabbccaabbaa"),
    ],
)
def test_switch_gives_turns_to_those_whose_range_holds_the_step(
    count: int, ranges: dict[str, object], acting: str
) -> None:
    plan = switch(count, switch_every=2, ranges=ranges)
    assert "".join(plan.active(Step(index, 20, 0.9)) for index in range(20)) == acting
    plan.check(20)


def test_switch_starts_the_solver_anew_where_a_range_ends() -> None:
    plan = switch(2, switch_every=4, ranges={"a": "0-0.3"}, solver_history="drop")
    assert [index for index in range(10) if plan.restarts(Step(index, 10, index / 10))] == [3]


@pytest.mark.parametrize(
    ("ranges", "problem"),
    [
        ({"a": "0-0.3", "b": "0.5-1"}, "nobody has a turn from 0.3 to 0.5 of the run. Widen"),
        ({"a": "0.1-1", "b": "0.2-1"}, "from 0 to 0.1 of"),
        ({"a": "0-0.6", "b": "0-0.8"}, "from 0.8 to 1 of"),
        ({"x": "0-1"}, "ranges: unknown adapter 'x'. Known: a, b"),
    ],
)
def test_switch_refuses_ranges_that_leave_steps_to_nobody(ranges: dict[str, str], problem: str) -> None:
    with pytest.raises(CompositionError, match=problem):
        switch(2, ranges=ranges)


def test_a_range_in_which_others_have_all_turns_is_said() -> None:
    with pytest.raises(
        CompositionError, match=r"run of 20 steps 'b' would never have a turn.*Widen the range"
    ):
        switch(2, switch_every=5, ranges={"b": "0-0.1"}).check(20)


@pytest.mark.parametrize("given", ["half", "0.5-0.2", "0-2", [0], 0.5], ids=str)
def test_what_is_no_range_is_refused(given: object) -> None:
    with pytest.raises(SpecError, match=r"ranges.a: a range is two fractions of the run"):
        parse_spec(Switch.Options, {"ranges": {"a": given}})


def test_ranges_are_read_from_flags_and_documents_as_they_are_written() -> None:
    given = {"prompt": "x", "method": "switch", "ranges": {"a": "0-0.4", "b": [1e-05, 1 / 3]}}
    spec = parse_spec(GenerateSpec, given)
    assert spec.model_dump(mode="json")["options"]["ranges"] == {"a": "0-0.4", "b": f"1e-05-{1 / 3}"}
    assert parse_spec(GenerateSpec, spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize("method", ["switch", "w-switch", "composite", "w-composite"])
def test_that_one_adapter_needs_no_such_method_is_said_once(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind = COMPOSERS[method]
    options = {"triggers": {method: "fox"}} if "triggers" in kind.Options.model_fields else {}
    for _ in range(2):
        kind(kind.Options(**options)).prepare({method: None}, {method: 1.0})
    assert caplog.text.count(f"'{method}' alone acts in every step, as it would by method 'merge'") == 1


def test_the_longest_prefix_gives_the_weight_of_a_layer() -> None:
    branch = Branch({"a": {"unet.up_blocks": 0.5, "unet.up_blocks.1": 0.25}, "b": 2.0})
    assert branch.weight("a", "unet.up_blocks.0.conv.weight") == 0.5
    assert branch.weight("a", "unet.up_blocks.1.conv.weight") == 0.25
    assert branch.weight("a", "unet.up_blocks.10.conv.weight") == 0.5
    assert branch.weight("a", "unet.mid_block.conv.weight") == 0.0
    assert branch.weight("b", "unet.mid_block.conv.weight") == 2.0
    assert branch.weight("c", "unet.mid_block.conv.weight") == 0.0
    assert branch.mean_weight("a") == 0.375
    assert not covers("unet.up", "unet.up_blocks.0.weight")


def test_the_examples_in_the_docstrings_hold() -> None:
    import doctest

    from studio.composition import plan

    assert doctest.testmod(plan).attempted > 0
    assert doctest.testmod(plan).failed == 0
