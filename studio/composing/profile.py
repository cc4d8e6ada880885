"""Say which frequencies adapters bring in: what decides when each of them leads in CMLoRA."""

from collections.abc import Mapping
from dataclasses import dataclass

from studio.bases import cached_base
from studio.composing.planning import load_adapters, tell_differences
from studio.composition.profiles import Measurement, Profile, profile
from studio.errors import AdapterError
from studio.specs import Event, OnEvent
from studio.specs.composing import ProfileSpec


@dataclass(frozen=True)
class ProfileReport:
    """What was measured.

    Attributes:
        profiles: By adapter, the highest score first.
    """

    profiles: Mapping[str, Profile]

    def roles(self) -> dict[str, str]:
        """Return the role that each adapter has by its score's sign, as ``cmlora`` takes it."""
        return {name: "high" if found.score > 0 else "low" for name, found in self.profiles.items()}

    def lines(self) -> list[str]:
        """Return a line for each adapter, and the flags that say the same without a base."""
        width = max(map(len, self.profiles))
        roles = self.roles()
        meaning = {"high": "high: leads early", "low": "low: leads late"}
        lines = [
            f"{name:<{width}}  {found.score:+.4f}  {meaning[roles[name]]}"
            for name, found in self.profiles.items()
        ]
        return [
            *lines,
            "--method cmlora " + " ".join(f"--roles {name}={role}" for name, role in roles.items()),
        ]


def measure_profiles(spec: ProfileSpec, *, on_event: OnEvent | None = None) -> ProfileReport:
    """Return the frequency profiles of adapters on their base; what was measured before is only looked up.

    Args:
        spec: The request.
        on_event: Told of what a person should know.

    Raises:
        BaseModelError: If the base cannot be loaded.
        AdapterError: If an adapter cannot be read or does not fit.
        CompositionError: If nothing can be measured on this base.
    """

    def tell(event: Event) -> None:
        if on_event:
            on_event(event)

    tell_differences(spec, tell)
    pipe = cached_base(spec.base, spec.device, spec.precision, on_event=tell)
    adapters = {name: adapter for name, adapter in load_adapters(spec, pipe).items() if adapter.changes}
    if not adapters:
        raise AdapterError("new tokens alone have no frequencies. Give adapters that change the base.")
    how = Measurement()
    pictures = len(how.prompts) * len(how.seeds)
    message = f"where it is not known yet, the base alone and with each draws {pictures} pictures"
    tell(Event(kind="message", message=f"{message} of {how.steps} steps; what they tell is kept"))
    found = profile(pipe, adapters, measurement=how)
    return ProfileReport(dict(sorted(found.items(), key=lambda each: -each[1].score)))
