"""Seconds to verify and to account a long ledger: 10,000 charges in 50 runs of 50 distinct (q, σ).

Run: python -m bract.simulations.benchmarks.audit_record --json
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bract.shared import contract, keys, versions
from bract.shared.contract import Contract, SignedContract
from bract.shared.policy import DomainPolicy, Policy
from bract.shared.privacy import accounting, budget, entries, prv, verification
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.entries import NO_PREVIOUS, Charge, Genesis
from bract.shared.privacy.ledger import Ledger
from bract.shared.privacy.transaction import Transaction
from bract.shared.terms import (
    ADJACENCY,
    DataTerms,
    ModelTerms,
    PrivacyTerms,
    SiteTerms,
    TrainingTerms,
)

RUNS, CHARGES = 50, 10_000
SITE, DOMAIN, DELTA = "alpha", "ward", 1e-6


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints how long each part took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--charges", type=int, default=CHARGES)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder) / "alpha.sqlite", charges=chosen.charges, runs=chosen.runs)
    if chosen.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<24} {value:.4g}")


def measure(path: Path, *, charges: int, runs: int) -> dict[str, float]:
    """Returns the seconds of each part, and the ε that it gave."""
    site = keys.generate()
    write(path, site, charges=charges, runs=runs)
    # An auditor's process has written nothing: what writing left is not to be looked at again.
    gc.collect()
    gc.freeze()
    started = time.perf_counter()
    (found,) = verification.verify(path, site_keys={SITE: site.public}, anchors={})
    verified = time.perf_counter()
    spent = accounting.epsilon(found.chain.events, DELTA)
    accounted = time.perf_counter()
    fine = accounting.epsilon(found.chain.events, DELTA, interval=accounting.THOROUGH_INTERVAL)
    second = prv.epsilon_prv(found.chain.events, DELTA)
    ended = time.perf_counter()
    return {
        "charges": sum(found.chain.attempts.values()),
        "runs": len(found.chain.attempts),
        "entries": found.chain.length,
        "verify_seconds": verified - started,
        "account_seconds": accounted - verified,
        "plain_seconds": accounted - started,
        # What --thorough takes: the chain, and both accountants at their finest.
        "thorough_seconds": (verified - started) + (ended - accounted),
        "epsilon": spent,
        "epsilon_thorough": fine,
        "epsilon_prv": second or 0.0,
    }


def write(path: Path, site: keys.SigningKey, *, charges: int, runs: int) -> None:
    """Writes a ledger of so many charges, by the code by which a gate appends them."""
    coordinator = keys.generate()
    policy = Policy(
        site=SITE,
        coordinators=(coordinator.public,),
        domains={DOMAIN: DomainPolicy(epsilon=8.0, delta=DELTA)},
        models=("linear",),
    )
    ledger = Ledger(path)
    try:
        # One transaction: what is measured is reading.
        with ledger.transaction() as transaction:
            transaction.keep("policy", policy.sha256, policy.to_bytes())
            chain = transaction.chain(SITE, DOMAIN, key=site.public)
            transaction.append(chain, _genesis(policy, site), site)
            for number in range(runs):
                rounds = charges // runs + (number < charges % runs)
                signed = contract.sign(_contract(coordinator, site, number, rounds), coordinator)
                _charge(transaction, chain, signed, policy, site)
    finally:
        ledger.close()


def _charge(
    transaction: Transaction,
    chain: Chain,
    signed: SignedContract,
    policy: Policy,
    site: keys.SigningKey,
) -> None:
    agreed, privacy = signed.contract, signed.contract.privacy
    transaction.keep("contract", agreed.sha256, signed.to_bytes())
    for number in range(1, agreed.rounds + 1):
        body = Charge(
            **_common(chain, policy, site, attempt=1),
            kind="charge",
            contract=agreed.sha256,
            run=agreed.run,
            round=number,
            primary=DOMAIN,
            weights=f"{number:064x}",
            event=entries.event_for(agreed),
            clip_norm=privacy.clip_norm.hex(),
            clipping="flat-l2",
            normaliser=agreed.normaliser(agreed.cohort[0]).hex(),
            sampler="poisson",
            mechanism="dp-sgd",
            randomness="csprng",
            versions=versions.installed(),
        )
        transaction.append(chain, body, site)


def _genesis(policy: Policy, site: keys.SigningKey) -> Genesis:
    terms = policy.domains[DOMAIN]
    return Genesis(
        **_common(Chain(site=SITE, domain=DOMAIN, key=site.public), policy, site, attempt=0),
        kind="genesis",
        nonce="0" * 32,
        simulation=False,
        unit="example",
        adjacency=ADJACENCY,
        delta=terms.delta.hex(),
        composition=budget.fixed_rule(terms),
    )


def _common(chain: Chain, policy: Policy, site: keys.SigningKey, *, attempt: int) -> dict[str, Any]:
    return {
        "schema_version": entries.SCHEMA_VERSION,
        "site": SITE,
        "key": site.public,
        "domain": DOMAIN,
        "sequence": chain.length,
        "previous": chain.head.hash if chain.head else NO_PREVIOUS,
        "genesis": chain.genesis_hash or NO_PREVIOUS,
        "policy": policy.sha256,
        "attempt": attempt,
    }


def _contract(
    coordinator: keys.SigningKey, site: keys.SigningKey, number: int, rounds: int
) -> Contract:
    """Returns the contract of one run; no two have the same (q, σ)."""
    return Contract(
        run=f"run-{number}",
        nonce=contract.new_nonce(),
        coordinator=coordinator.public,
        simulation=False,
        rounds=rounds,
        max_attempts=rounds,
        model=ModelTerms(name="linear"),
        data=DataTerms(name="digits", shape=(1, 8, 8), classes=10),
        training=TrainingTerms(local_steps=1, learning_rate=1.0),
        privacy=PrivacyTerms(
            sampling_rate=0.001 + 0.0001 * number,
            noise_multiplier=1.0 + 0.02 * number,
            clip_norm=1.0,
        ),
        cohort=(SiteTerms(name=SITE, key=site.public, domain=DOMAIN, nominal_size=10_000),),
    )


if __name__ == "__main__":
    main()
