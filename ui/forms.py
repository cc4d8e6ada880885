"""Form fields made from the specifications: type, default, label and text come from the pydantic fields.

A field added to a specification, or an option of a new method, appears in the page without a line of its own.
"""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import gradio as gr
from pydantic import BaseModel

from studio.registry import FORMATS, MERGERS
from studio.specs import MethodSpec, settable
from studio.specs.groups import grouped

Values = dict[str, Any]
Layout = Literal["plain", "list", "table"]
_LAYOUTS: dict[str, Layout] = {"array": "list", "object": "table"}  # by type in the JSON schema

_WORDS = {
    "ema": "EMA", "grad": "gradient", "lora": "LoRA", "moslora": "MoSLoRA", "num": "number of",
    "rslora": "rsLoRA", "snr": "SNR", "unet": "UNet", "vae": "VAE",
}  # fmt: skip


@dataclass(frozen=True)
class Field:
    """One field on the page.

    Attributes:
        name: The specification's name for it.
        method: The method whose option it is; None for a field of the specification itself.
        nullable: Whether an empty field means "none".
        layout: How its value stands in the component: as it is, as a list with one entry per line, or as a
            table with one ``name = value`` per line.
        component: What shows it.
    """

    name: str
    method: str | None
    nullable: bool
    layout: Layout
    component: Any

    def read(self, value: Any) -> Any:
        """Return the specification's value for what stands in the component."""
        if self.layout != "plain":
            lines = [line.strip() for line in (value or "").splitlines() if line.strip()]
            return lines if self.layout == "list" else dict(_pair(line) for line in lines)
        return None if self.nullable and value == "" else value

    def write(self, value: Any) -> Any:
        """Return what the component shows for a value of the specification."""
        if self.layout != "plain":
            return _as_lines(value)
        return ("" if value is None else str(value)) if self.nullable else value


class Form:
    """The fields of one specification and of all its methods' options.

    Args:
        spec_type: The specification.
        start: Values that differ from the defaults when the page opens, options of its method among them.
    """

    def __init__(self, spec_type: type[MethodSpec], start: Mapping[str, Any]) -> None:
        self.spec_type = spec_type
        self.start = start
        self._first = str(start.get("method", spec_type.model_fields["method"].default))
        self.fields: list[Field] = []
        self._groups: dict[str, list[Any]] = {}
        self._about: Any = None

    @property
    def components(self) -> list[Any]:
        """All components in the order in which ``read`` and ``write`` take their values."""
        return [field.component for field in self.fields]

    def add(self, name: str, **looks: Any) -> Any:
        """Place one field of the specification here; ``looks`` goes to its component."""
        return self._place(self.spec_type, name, None, looks)

    def add_rest(self, *, leave_out: Iterable[str]) -> None:
        """Place every field of the specification that has no place yet here, apart from some.

        Where they belong to several groups each group is folded up under its heading.
        """
        placed = {field.name for field in self.fields if field.method is None} | {*leave_out}
        groups = {
            heading: [name for name in names if name not in placed and _schema(self.spec_type, name)]
            for heading, names in grouped(self.spec_type).items()
        }
        groups = {heading: names for heading, names in groups.items() if names}
        for heading, names in groups.items():
            with ExitStack() as places:
                if len(groups) > 1:
                    places.enter_context(folded(heading.capitalize()))
                places.enter_context(gr.Row(elem_classes="fields"))
                for name in names:
                    self.add(name)

    def add_options(
        self,
        only: Sequence[str] | None = None,
        *,
        container: Callable[..., Any] = gr.Row,
        min_width: int = 170,
        **looks: Any,
    ) -> None:
        """Place the options of each method here, those of the chosen one visible.

        Args:
            only: Names to place; default: all that have no place yet.
            container: What holds the options of one method.
            min_width: Pixels of a field; ``looks`` goes to its component.
        """
        for method in self.spec_type.registry.names():
            options = self.spec_type.registry[method].Options
            placed = {field.name for field in self.fields if field.method == method}
            names = [name for name in (only or options.model_fields) if name in options.model_fields]
            names = [name for name in names if name not in placed and _schema(options, name)]
            if not names:
                continue
            with container(
                visible=method == self._first,
                elem_classes="fields",
                **({"min_width": min_width} if container is gr.Column else {}),
            ) as group:
                for name in names:
                    self._place(options, name, method, {"min_width": min_width} | looks)
            self._groups.setdefault(method, []).append(group)

    def add_about(self) -> None:
        """Place a line that says what the chosen method does."""
        self._about = gr.HTML(self._described(self._first), elem_classes="about")

    def show_with(self, method: str, group: Any) -> None:
        """Show another part of the page while a method is chosen."""
        self._groups.setdefault(method, []).append(group)

    def follow_method(self) -> None:
        """Show the options of the method that is chosen; call once, after all fields have their place."""
        method = next(field.component for field in self.fields if field.name == "method")
        groups = [(name, group) for name, groups in self._groups.items() for group in groups]
        about = [self._about] if self._about else []
        if groups or about:
            method.change(
                lambda chosen: _one_or_all(
                    [gr.update(visible=name == chosen) for name, _ in groups]
                    + [self._described(chosen) for _ in about]
                ),
                inputs=method,
                outputs=[*(group for _, group in groups), *about],
                show_progress="hidden",
                api_visibility="private",
            )

    def read(self, values: Sequence[Any]) -> Values:
        """Return the request: the specification's fields and the options of the chosen method."""
        pairs = list(zip(self.fields, values, strict=True))
        method = next((value for field, value in pairs if field.name == "method"), None)
        wanted = [(field, value) for field, value in pairs if field.method in (None, method)]
        request = {field.name: field.read(value) for field, value in wanted}
        known = settable(self.spec_type, method)
        required = [name for name, field in known.items() if field.is_required()]
        empty: tuple[Any, ...] = ("", None, [], {})
        return {name: value for name, value in request.items() if not (name in required and value in empty)}

    def write(self, request: Mapping[str, Any]) -> list[Any]:
        """Return what the components show for a request; fields it does not name stay as they are."""
        given = dict(request.get("options") or {}) | dict(request)
        method = given.get("method", self.spec_type.model_fields["method"].default)
        return [
            gr.update(value=field.write(given[field.name]))
            if field.name in given and field.method in (None, method)
            else gr.skip()
            for field in self.fields
        ]

    def _described(self, method: str) -> str:
        return html.escape(described(self.spec_type.registry[method]))

    def _place(self, model: type[BaseModel], name: str, method: str | None, looks: Mapping[str, Any]) -> Any:
        schema = _schema(model, name) or {}
        start = self.start if method in (None, self._first) else {}
        shown = dict(schema, default=start.get(name, schema.get("default")))
        layout = _LAYOUTS.get(schema.get("type", ""), "plain")
        component = _component(name, shown, _choices(self.spec_type, name), looks)
        self.fields.append(Field(name, method, bool(schema.get("nullable")), layout, component))
        return component


def field_of(options: type[BaseModel], name: str) -> Field:
    """Place one option of something that is no method, and return its field."""
    schema = _schema(options, name)
    assert schema is not None, f"no component can show {name}"
    layout = _LAYOUTS.get(schema.get("type", ""), "plain")
    component = _component(name, schema, None, {})
    return Field(name, None, bool(schema.get("nullable")), layout, component)


def described(member: Any) -> str:
    """Return the first line of what a member of a registry says about itself."""
    return (member.__doc__ or "").strip().partition("\n")[0].replace("``", "`")


def folded(heading: str) -> Any:
    """Return a part of a form that opens under its heading."""
    return gr.Accordion(heading, open=False, elem_classes="folded")


def label(name: str) -> str:
    """Return a field's name as a person writes it: ``min_snr_gamma`` becomes "Min SNR gamma"."""
    first, *others = name.split("_")
    return " ".join([_WORDS.get(first, first.capitalize()), *(_WORDS.get(word, word) for word in others)])


def _schema(model: type[BaseModel], name: str) -> Values | None:
    """Return a field's JSON schema with ``nullable`` resolved, or None if no component can show it."""
    raw = _properties(model)[name]
    branches = [branch for branch in raw.get("anyOf", ()) if branch.get("type") != "null"]
    schema = (
        raw | (branches[0] if branches else {}) | {"nullable": len(branches) != len(raw.get("anyOf", ()))}
    )
    simple = schema.get("type") in ("string", "integer", "number", "boolean") or "enum" in schema
    # True stands for entries that the option itself reads from text.
    entries = schema.get("items", schema.get("additionalProperties"))
    lines = entries is True or (
        isinstance(entries, Mapping)
        and entries.get("type") in ("string", "integer", "number")
        # Masks are painted, see ``regions.py``.
        and entries.get("format") != "mask"
    )
    return schema if simple or lines else None


@cache
def _properties(model: type[BaseModel]) -> Mapping[str, Values]:
    properties: Mapping[str, Values] = model.model_json_schema()["properties"]
    return properties


def _choices(spec_type: type[MethodSpec], name: str) -> tuple[list[str], bool] | None:
    """Return the names that a field of text offers and whether others may be written, or None."""
    named = {
        "method": (spec_type.registry.names, False),
        "format": (FORMATS.names, False),
        "how": (MERGERS.names, False),
        "base": (lambda: ["starter"], True),
        "device": (lambda: ["auto", "cpu", "cuda", "mps"], True),
    }
    if name not in named:
        return None
    names, open_end = named[name]
    return names(), open_end


def _component(
    name: str, schema: Values, choices: tuple[list[str], bool] | None, looks: Mapping[str, Any]
) -> Any:
    value = schema.get("default")
    common: Values = {"label": label(name), "info": schema.get("description"), "min_width": 170} | dict(looks)
    if choices or "enum" in schema:
        names, open_end = choices or (schema["enum"], False)
        offered = [("automatic", ""), *names] if schema["nullable"] else names
        return gr.Dropdown(
            offered, value="" if value is None else value, allow_custom_value=open_end, **common
        )
    if schema["type"] == "boolean":
        return gr.Checkbox(value=value, **common)
    if schema["type"] in ("integer", "number") and not schema["nullable"]:
        # The browser's arrows step by this; any number may be typed, and the specification judges it.
        fine = 1 if schema["type"] == "integer" else 0.0001 if float(value or 0) < 0.1 else 0.1
        return gr.Number(value=value, step=fine, **common)
    if schema["type"] in _LAYOUTS:
        shape = "one per line" if schema["type"] == "array" else "name = value, one per line"
        return gr.Textbox(value=_as_lines(value), lines=2, placeholder=shape, **common)
    # A number that may be left out is a line of text, because a number field cannot be empty.
    return gr.Textbox(value="" if value is None else str(value), **common)


def _pair(line: str) -> tuple[str, str]:
    """Return name and value of ``name = value``; a name alone has an empty value, which its type refuses."""
    name, equals, value = line.rpartition("=")
    return (name.strip(), value.strip()) if equals else (line, "")


def _as_lines(value: Mapping[str, Any] | Sequence[Any] | None) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{key} = {entry}" for key, entry in value.items())
    return "\n".join(map(str, value or ()))


def _one_or_all(updates: list[Any]) -> Any:
    """Return updates as Gradio wants them: a single output takes no list."""
    return updates[0] if len(updates) == 1 else updates
