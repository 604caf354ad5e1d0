"""What queries pass before they reach the shards of a version."""

from dataclasses import dataclass

import numpy as np

from penstock.operators.routing import Router, Routing
from penstock.operators.search_parameters import SearchParameters
from penstock.operators.transforms import Chain


@dataclass(frozen=True, eq=False)
class Entrance:
    """Transforms, and what finds the shards that queries need, if there are any."""

    chain: Chain | None
    router: Router | None

    def route(self, queries: np.ndarray, parameters: SearchParameters) -> Routing | None:
        """Which shards the queries, float32 (q, d), need; None for all of them."""
        return None if self.router is None else self.router.route(self.transformed(queries), parameters)

    def transformed(self, queries: np.ndarray) -> np.ndarray:
        """Queries behind the transforms."""
        return self.chain.apply_queries(queries) if self.chain else queries
