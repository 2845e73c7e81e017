"""Branch sections: what a block adds to its input, computed by one module after another.

The block's own code is left as it is. The first module of the branch hands on the rows that run,
the last one gives them back among zeros, gated: ``y = x + gate * f(x)``, where the block does the
addition. So a block with two residual branches (attention and MLP, say) has two sections.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from layerprune.gate import Gate
from layerprune.sections.base import BranchCall, Section
from layerprune.sections.placeholders import Nothing, PassThrough
from layerprune.sections.residual import GATE_ATTRIBUTE


@dataclass(frozen=True)
class Link:
    """A module, and how it is called.

    Attributes:
        name: its qualified name.
        module: it.
        keys: the positions or names of the arguments that are its input.
        place: where its output stands in its result, if that is a tuple.
        width: elements of that tuple; None for a bare tensor.
        several_arguments: whether it is called with more than its input.
        batched: positions or names of further arguments that carry the batch; of one in a
            container, with its place in it.
        shared: those of the other tensors among them.
    """

    name: str
    module: nn.Module
    keys: tuple[int | str, ...] = (0,)
    place: int = 0
    width: int | None = None
    several_arguments: bool = False
    batched: frozenset = frozenset()
    shared: frozenset = frozenset()

    def remainder(self) -> nn.Module:
        """What stands in the module's place when it does nothing any more."""
        if self.keys == (0,) and self.width is None and not self.several_arguments:
            return nn.Identity()
        return PassThrough(self.keys[0], self.place, self.width)

    def output(self, *args: object, **kwargs: object) -> Tensor:
        """What of the module's result goes on."""
        result = self.module(*args, **kwargs)
        return result if self.width is None else result[self.place]

    def among(self, modules: dict[str, nn.Module]) -> Link:
        """The link of the same name among other modules; it may have gone with its block."""
        return replace(self, module=modules.get(self.name, nn.Identity()))

    def description(self) -> dict[str, object]:
        """See `Section.description`."""
        return {
            "name": self.name,
            "key": self.keys[0],
            "place": self.place,
            "width": self.width,
            "several_arguments": self.several_arguments,
        }


@dataclass(frozen=True)
class Block:
    """The block around a branch, where nothing but its branches stands between input and output.

    Attributes:
        link: the block, and how it is called.
        ends: names, within the block, of the last modules of its branches.
    """

    link: Link
    ends: tuple[str, ...]

    def is_void(self) -> bool:
        """Whether all branches are gone."""
        modules = dict(self.link.module.named_modules())
        return all(isinstance(modules.get(end), Nothing) for end in self.ends)


@dataclass(frozen=True)
class BranchSection(Section):
    """A section that is a chain of modules inside of a block.

    Its name and module are those of the link with most parameters.

    Attributes:
        links: the modules, in the order of their calls.
        shaped: whether a removed branch has to give zeros of its input's shape.
        block: the block, if that is to go with its last branch.
    """

    links: tuple[Link, ...] = ()
    shaped: bool = False
    block: Block | None = None

    @property
    def kind(self) -> str:
        """See `Section`."""
        return "branch"

    @property
    def is_gated(self) -> bool:
        """See `Section`."""
        own = getattr(self.module, GATE_ATTRIBUTE, None)
        return own is not None and own[1].gate.owned

    def attach(self, gate: Gate) -> None:
        """See `Section`."""
        from layerprune.sections.branch_twin import BranchTwin, Passage
        from layerprune.sections.twins import twin_of

        passage = Passage(gate, self.links[0], self.links[-1], self.shaped)
        for link in self.links:
            if not isinstance(link.module, BranchTwin):
                link.module.__class__ = twin_of(BranchTwin, type(link.module))
            setattr(link.module, GATE_ATTRIBUTE, (link, passage))

    def detach(self) -> None:
        """See `Section`."""
        for link in self.links:
            delattr(link.module, GATE_ATTRIBUTE)
            link.module.__class__ = type(link.module).__mro__[2]

    def remainders(self, nonnegative_input: bool) -> list[tuple[nn.Module, nn.Module]]:
        """See `Section`."""
        last = self.links[-1]
        nothing_left = Nothing(last.keys[0], last.place, last.width, self.shaped)
        pairs = [(link.module, link.remainder()) for link in self.links[:-1]]
        return [*pairs, (last.module, nothing_left)]

    def emptied(self) -> list[tuple[nn.Module, nn.Module]]:
        """See `Section`."""
        if self.block is None or not self.block.is_void():
            return []
        return [(self.block.link.module, self.block.link.remainder())]

    def in_model(self, model: nn.Module) -> BranchSection:
        """See `Section`."""
        there = dict(model.named_modules(remove_duplicate=False))
        links = tuple(link.among(there) for link in self.links)
        (module,) = (link.module for link in links if link.name == self.name)
        block = self.block and replace(self.block, link=self.block.link.among(there))
        return replace(self, module=module, links=links, block=block)

    def description(self) -> dict[str, object]:
        """See `Section`."""
        block = self.block and {
            **self.block.link.description(),
            "ends": list(self.block.ends),
        }
        return {
            "name": self.name,
            "kind": self.kind,
            "links": [link.description() for link in self.links],
            "shaped": self.shaped,
            "block": block,
        }

    def branch_tensors(self) -> list[tuple[nn.Module, list[str]]]:
        """See `Section`."""
        return [(link.module, list(link.module.state_dict())) for link in self.links]

    def branch_parameters(self) -> list[nn.Parameter]:
        """See `Section`."""
        return [parameter for link in self.links for parameter in link.module.parameters()]

    def branch_flops(self, flops: dict[str, float]) -> float:
        """See `Section`."""
        return sum(flops.get(link.name, 0.0) for link in self.links)

    def branch_calls(self) -> list[BranchCall]:
        """See `Section`."""
        return [(link.module, link.output) for link in self.links]
