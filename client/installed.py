"""Opens the site of a SITE.toml: gate, ledger, data roots and a warm model, in one process."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from bract.client import holdings, settings
from bract.client.fingerprint import Fingerprints
from bract.client.gate import Gate
from bract.client.holdings import Roots
from bract.client.settings import SiteSettings
from bract.client.site import Site, Trainers
from bract.client.training import devices
from bract.client.training.execution import Execution
from bract.client.training.randomness import SecureRandomness
from bract.client.updates import UpdateStore
from bract.shared import canonical, keys
from bract.shared.errors import UnknownName, UsageError
from bract.shared.locks import hold
from bract.shared.privacy.head_file import HeadFile
from bract.shared.privacy.ledger import Ledger

logger = logging.getLogger("bract.client")

FACTORY = "bract.client.installed:open_site"


@dataclass(frozen=True, slots=True)
class SiteState:
    """The files of a site's lasting state."""

    folder: Path

    @property
    def ledger(self) -> Path:
        """The ledger."""
        return self.folder / "ledger.sqlite"

    @property
    def bindings(self) -> Path:
        """Which data each domain counts, fixed when it was first opened."""
        return self.folder / "domains.json"

    @property
    def status(self) -> Path:
        """What the running process last said of itself."""
        return self.folder / "status.json"

    @property
    def lock(self) -> Path:
        """Held by the one process that may use this state."""
        return self.folder / "lock"


def open_site(context: Context) -> Site:
    """Returns the site that a node's own configuration names by the path of its SITE.toml."""
    path = context.node_config.get("site")
    if not path:
        raise UsageError('this node has no site: start it with --node-config site="SITE.toml"')
    return opened(str(path))


@lru_cache(maxsize=1)
def opened(path: str) -> Site:
    """Returns the site of a SITE.toml; its state folder is locked while this process lives.

    Raises:
        UsageError: where the file, a key or a data root will not do, or the ledger fixed other
            terms than the file has.
        BractError: where another process uses the state.
    """
    chosen = settings.read(Path(path))
    gate = _gate(chosen, head_file_of(chosen))
    if chosen.head_file is None:
        logger.warning(
            "no head_file: a ledger that is put back from a backup between two runs would not be "
            "noticed here; name one on another disk in %s",
            path,
            extra={"event": "started", "site": chosen.site},
        )
    gate.check_ledger()
    return Site(
        name=chosen.site,
        gate=gate,
        randomness=SecureRandomness(),
        trainers=Trainers(_execution(chosen)),
        fingerprints=Fingerprints(Path(chosen.state) / "fingerprints"),
    )


def recover(path: str, domain: str) -> float:
    """Returns the ε that a domain counts as spent after its ledger lost entries.

    Raises:
        UsageError: where there is no such domain, or it is closed already.
    """
    chosen = settings.read(Path(path))
    if domain not in chosen.domains:
        raise UnknownName("domain", domain, chosen.domains)
    head_file = head_file_of(chosen)
    seen = head_file.read() if head_file else {}
    # The ledger as it was put back, not held against the heads that it lost.
    gate = _gate(chosen, None)
    spent = gate.recover(
        domain,
        seen.get((chosen.site, domain)),
        head_file.ceiling(chosen.site, domain) if head_file else 0.0,
    )
    with gate.ledger.transaction() as transaction:
        head = transaction.chain(chosen.site, domain, key=gate.key.public).head
    if head_file is not None and head is not None:
        head_file.write({**seen, (chosen.site, domain): head})
    return spent


def _gate(chosen: SiteSettings, head_file: HeadFile | None) -> Gate:
    state = SiteState(Path(chosen.state))
    try:
        state.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UsageError(
            f"cannot make the folder {state.folder}: {error.strerror}; correct state"
        ) from error
    hold(state.lock, "one process serves a site; stop the other")
    for folder in (state.folder, state.folder / "updates"):
        canonical.remove_leftovers(folder)
    if chosen.head_file:
        heads = Path(chosen.head_file).resolve()
        canonical.remove_leftovers(heads.parent, heads.name)
    roots = {name: domain.data for name, domain in chosen.domains.items()}
    policy = chosen.policy()
    holdings.bind(roots, policy, state.bindings)
    if head_file is not None:
        head_file.allow(chosen.site, {name: one.epsilon for name, one in policy.domains.items()})
    return Gate(
        policy=policy,
        key=keys.load(Path(chosen.keys.ledger)),
        ledger=Ledger(state.ledger, head_file=head_file),
        updates=UpdateStore(state.folder / "updates"),
        holdings=Roots(roots),
        simulation=False,
        randomness=SecureRandomness.kind,
    )


def head_file_of(chosen: SiteSettings) -> HeadFile | None:
    """Returns the file that keeps the heads apart from the ledger, where the site has one."""
    return HeadFile(Path(chosen.head_file)) if chosen.head_file else None


def _execution(chosen: SiteSettings) -> Execution:
    device = str(devices.resolve(chosen.device))
    return Execution(
        device=device, physical_batch=chosen.physical_batch, precision=chosen.precision
    )
