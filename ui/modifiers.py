"""Plan modifiers as fields: a box to tick for each, its options below it."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from studio.registry import MODIFIERS
from studio.ui.forms import Field, Values, described, field_of, label


class ModifierFields:
    """The modifiers of the registry with all their options.

    Attributes:
        boxes: What switches each of them on.
        fields: Options of each of them.
    """

    def __init__(self) -> None:
        self.boxes: dict[str, gr.Checkbox] = {}
        self.fields: dict[str, list[Field]] = {}
        self._groups: dict[str, Any] = {}

    @property
    def components(self) -> list[Any]:
        """All components in the order in which ``read`` and ``write`` take their values."""
        own = [[self.boxes[name], *(field.component for field in self.fields[name])] for name in self.boxes]
        return [component for group in own for component in group]

    def layout(self) -> None:
        """Place a box for each modifier and, below it, its options, seen while it is ticked."""
        for name in MODIFIERS.names():
            kind = MODIFIERS[name]
            self.boxes[name] = box = gr.Checkbox(
                False, label=label(name.replace("-", "_")), info=described(kind), elem_id=f"modifier-{name}"
            )
            with gr.Row(visible=False, elem_classes="fields") as group:
                self.fields[name] = [field_of(kind.Options, option) for option in kind.Options.model_fields]
            box.change(
                lambda ticked: gr.update(visible=ticked),
                inputs=box,
                outputs=group,
                show_progress="hidden",
                api_visibility="private",
            )

    def read(self, values: Sequence[Any]) -> dict[str, Values]:
        """Return the options of the modifiers that are switched on; an empty field is left out."""
        left = iter(values)
        found: dict[str, Values] = {}
        for name in self.boxes:
            ticked = next(left)
            options = {field.name: field.read(next(left)) for field in self.fields[name]}
            if ticked:
                found[name] = {key: value for key, value in options.items() if value not in ("", [], {})}
        return found

    def write(self, modifiers: Mapping[str, Mapping[str, Any]] | None) -> list[Any]:
        """Return what the components show for a request's modifiers; for None they stay as they are."""
        if modifiers is None:
            return [gr.skip() for _ in self.components]
        updates: list[Any] = []
        for name in self.boxes:
            given = modifiers.get(name)
            updates.append(gr.update(value=given is not None))
            updates += [
                gr.update(value=field.write(given[field.name]))
                if given and field.name in given
                else gr.skip()
                for field in self.fields[name]
            ]
        return updates
