"""Try a new model on a sample before a corpus is embedded with it, and say what it would change."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from penstock.cluster.leases import acquire
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.paired_samples import compared_models
from penstock.pipelines.bridges import fit_bridges
from penstock.pipelines.canary_sample import Canary, TakenSample
from penstock.pipelines.history import new_run_id
from penstock.pipelines.loading import Origin
from penstock.pipelines.model_pair import ModelPair, published_manifest, refuse_other_model
from penstock.pipelines.planning import Plan, Resolved, decided_before
from penstock.pipelines.progress import Reporter
from penstock.pipelines.running import Run


def canary(session: Session, taken: TakenSample, bridges: Mapping[str, Any]) -> dict[str, Any]:
    """The report of a sample, as JSON: each pairing of queries and documents, what is alike in the two spaces, the
    health of both, and the bridges.

    Args:
        bridges: what `fit_bridges` gave for the sample.
    """
    found = session.run(compared_models, taken.paired)
    bridged = bridges["directions"].get("queries_to_old")
    if bridged is not None:
        found["pairings"]["bridged_to_old"] = bridged["figures"]
    return {
        "old": asdict(taken.paired.old.identity),
        "new": asdict(taken.paired.new.identity),
        "k": taken.paired.k,
        "seed": taken.paired.seed,
        "sample": taken.about,
        **found,
        "bridges": dict(bridges),
    }


@dataclass
class ModelTrial:
    """A new model tried on a sample of a published index.

    Attributes:
        passages: how many to draw, beside those of judged documents.
    """

    session: Session
    store: Store
    reporter: Reporter
    origin: Origin
    passages: int
    seed: int

    def run(self, old: Resolved, plan: Plan) -> dict[str, Any]:
        """Bridges from the version that the pipeline's alias points to, and the report of the sample they are fitted
        to.

        Args:
            old: the pipeline that published the version. plan: of the same pipeline with another model.

        Raises:
            LeaseHeld, StoreUnsuitable: as a run.
            ModelMismatch, ValueError: as ModelPair.
        """
        store, reporter = self.store, self.reporter
        store.probe()
        old, manifest = decided_before(old, store), published_manifest(old, store)
        refuse_other_model(old, manifest)
        run = Run(plan.resolved, self.origin, store, self.session, reporter, new_run_id(plan.resolved.pipeline.name))
        with acquire(store, plan.resolved.pipeline.name, run.run_id):
            facts = run.selected()
            pair = ModelPair(old, run.resolved, manifest)
            sampling = (pair, facts, self.passages, self.seed)
            taken = Canary(self.session, store, reporter, self.origin, run.run_id, *sampling).take()
            bridges = fit_bridges(self.session, store, reporter, taken)
            return {"version": manifest["version"], **canary(self.session, taken, bridges)}
