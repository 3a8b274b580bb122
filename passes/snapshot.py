"""Copies of a graph: to go back to, and to keep."""

from __future__ import annotations

import copy

from torch import fx


class Snapshot:
    """A remembered graph, to be built again as often as asked.

    Taken before every pass and hardly ever needed: it only keeps what the nodes held (arguments are
    immutable in fx). Fake values are shared, modules stay where they are.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.codegen = graph._codegen
        self.records = [
            (n, n.name, n.target, n.args, n.kwargs, n.type, copy.copy(n.meta)) for n in graph.nodes
        ]

    def graph(self) -> fx.Graph:
        """A fresh copy of the graph as it was."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for old, name, target, args, kwargs, kind, meta in self.records:
            args, kwargs = fx.node.map_arg((args, kwargs), env.__getitem__)
            new = graph.create_node(old.op, target, args, kwargs, name, kind)
            new.meta = copy.copy(meta)
            if hasattr(old, "_dynamo_source"):
                new._dynamo_source = old._dynamo_source
            env[old] = new
        graph._codegen = self.codegen
        return graph


def copy_graph(source: fx.Graph) -> fx.Graph:
    """A copy of a graph with its facts."""
    return Snapshot(source).graph()
