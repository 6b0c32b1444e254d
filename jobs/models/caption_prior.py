"""The n-gram prior of captions as tables that a model looks up: what captions alone tell, before it learns.

The distribution is that of ``jobs.captions.prior`` (Witten and Bell's interpolation) from the same captions.
Contexts are the nodes of a tree: a language's node has the counts of all of its tokens, its child for token a
of what follows a, the child of that one for b of what follows b a. Node 0 is the context that was never seen.

In training a caption must not find itself among the counts: its own are taken out of them (leaving one out:
Ney, Essen and Kneser, "On Structuring Probabilistic Dependences in Stochastic Language Modelling", 1994), so
that a model learns beside the prior that it will meet with captions that are new.

Shape suffixes: B rows, T text positions, N = B T contexts, O tokens back, L = O + 1 lengths of a context,
V vocabulary, E counted pairs, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.data.curated import open_set
from jobs.models.captioner import CaptionHead, Row


class PriorTable(nn.Module):
    """Of ``texts``, each a language's token and a caption's, over ``vocabulary`` tokens of which ``end`` ends
    each caption; looks up to ``order`` tokens back. The texts' first tokens are below ``languages``, by
    default tokens like the others.

    The tables are constants of integers, in no state dict, never written to.
    """

    keys: Tensor
    begins: Tensor
    tokens_E: Tensor
    counts_E: Tensor
    roots: Tensor
    pairs_E: Tensor
    before_E: Tensor

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        *,
        order: int,
        vocabulary: int,
        end: int,
        languages: int | None = None,
    ) -> None:
        super().__init__()
        self.order, self.end, self.vocabulary = order, end, vocabulary
        self.before = vocabulary
        """In the place of a token before the first one."""
        flat = np.concatenate([np.asarray(text, dtype=np.int64) for text in texts])
        ends = np.cumsum([len(text) for text in texts])
        following = np.roll(flat, -1)
        following[ends - 1] = end
        starts = np.repeat(np.concatenate(([0], ends[:-1])), np.diff(ends, prepend=0))
        places = np.arange(len(flat))
        begun, node = np.unique(flat[starts], return_inverse=True)
        node, nodes = node + 1, 1 + len(begun)
        keys, pairs = [np.empty(0, np.int64)], [node * vocabulary + following]
        for back in range(order):
            token = np.where(places - back > starts, flat[np.maximum(places - back, 0)], self.before)
            found, node = np.unique(node * (vocabulary + 1) + token, return_inverse=True)
            node, nodes = node + nodes, nodes + len(found)
            keys.append(found)
            pairs.append(node * vocabulary + following)
        pair_E, counts_E = np.unique(np.concatenate(pairs), return_counts=True)
        root_of = np.zeros(languages or vocabulary, dtype=np.int64)
        root_of[begun] = np.arange(1, 1 + len(begun))
        tables = {
            "keys": np.concatenate(keys),
            "begins": np.searchsorted(pair_E // vocabulary, np.arange(nodes + 1)),
            "tokens_E": pair_E % vocabulary,
            "counts_E": counts_E,
            "roots": root_of,
            "pairs_E": pair_E,
            "before_E": np.concatenate(([0], np.cumsum(counts_E))),
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table.astype(np.int64)), persistent=False)

    def forward(self, row: dict[str, Tensor], strengths_BTL: Tensor | None = None) -> Tensor:
        """Log-probabilities ``B T V`` of the tokens that follow in a row (``tokens``, ``segment`` and
        ``position``, each B T) of the model; in training, without a caption's own among the counts.
        ``strengths_BTL`` is as for ``log_probabilities``."""
        tokens_BT = row["tokens"]
        nodes = self.nodes(*self.contexts(row))
        own = (self.what_follows(row), row["segment"]) if self.training else None
        strengths_NL = None if strengths_BTL is None else strengths_BTL.flatten(0, 1)
        return self.log_probabilities(nodes, strengths_NL, own).view(*tokens_BT.shape, -1)

    def contexts(self, row: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``language_N`` and ``history_NO`` of every position of a row, for ``nodes``."""
        tokens_BT, position_BT = row["tokens"], row["position"]
        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        language_BT = tokens_BT.gather(1, places_T - position_BT)
        back_O = torch.arange(self.order, device=tokens_BT.device)
        history_BTO = tokens_BT[:, (places_T[:, None] - back_O).clamp(min=0)]
        history_BTO = history_BTO.masked_fill(position_BT[..., None] <= back_O, self.before)
        return language_BT.flatten(), history_BTO.flatten(0, 1)

    def what_follows(self, row: dict[str, Tensor]) -> Tensor:
        """``B T``: the token that each position of a row is to tell, the end after the last of a sample."""
        tokens_BT, segment_BT = row["tokens"], row["segment"]
        last_BT = segment_BT.roll(-1, dims=1) != segment_BT
        last_BT[:, -1] = True
        return tokens_BT.roll(-1, dims=1).masked_fill(last_BT, self.end)

    def following(self, text: Sequence[int], strengths_L: Tensor | None = None) -> Tensor:
        """``V``: of what comes after ``text``, a language's token and a caption so far; by itself, so that
        its bits depend on nothing else."""
        history = [*reversed(text[1:]), *[self.before] * self.order][: self.order]
        device = self.roots.device
        nodes = self.nodes(
            torch.tensor([text[0]], device=device), torch.tensor([history], dtype=torch.int64, device=device)
        )
        return self.log_probabilities(nodes, None if strengths_L is None else strengths_L[None])[0]

    def nodes(self, language_N: Tensor, history_NO: Tensor) -> list[Tensor]:
        """The nodes of each context, from the shortest on; ``history_NO`` begins with the newest token."""
        found = [self.roots[language_N]]
        for length in range(self.order):
            wanted_N = found[-1] * (self.vocabulary + 1) + history_NO[:, length]
            place_N = torch.searchsorted(self.keys, wanted_N).clamp(max=len(self.keys) - 1)
            there_N = self.keys[place_N] == wanted_N
            first = len(self.begins) - 1 - len(self.keys)
            found.append(torch.where(there_N, place_N + first, 0))
        return found

    def log_probabilities(
        self,
        nodes: list[Tensor],
        strengths_NL: Tensor | None = None,
        own: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Of what ``probabilities`` gives."""
        return self.probabilities(nodes, strengths_NL, own).log()

    def probabilities(
        self,
        nodes: list[Tensor],
        strengths_NL: Tensor | None = None,
        own: tuple[Tensor, Tensor] | None = None,
        beyond_NV: Tensor | None = None,
    ) -> Tensor:
        """``N V`` float32. In each length's distribution the next shorter one's has ``exp(strengths_NL)``
        times the weight of Witten and Bell's rule (None: just that). ``own``: what follows each context, and
        its sample (both B T; a sample -1 has nothing in the counts). ``beyond_NV`` is what is believed
        without any count (None: all tokens alike).
        """
        p_NV = beyond_NV
        if p_NV is None:
            p_NV = torch.full((len(nodes[0]), self.vocabulary), 1 / self.vocabulary, device=nodes[0].device)
        for length, node_N in enumerate(nodes):
            counts_NV = self.counts(node_N)
            if own is not None:
                _take_out(counts_NV, node_N, *own)
            seen_N1 = counts_NV.sum(dim=1, keepdim=True)
            shorter_N1 = (counts_NV > 0).sum(dim=1, keepdim=True).float()
            if strengths_NL is not None:
                shorter_N1 = shorter_N1 * strengths_NL[:, length, None].exp()
            shorter_N1 = shorter_N1 + (seen_N1 == 0)
            total_N1 = seen_N1 + shorter_N1
            p_NV = counts_NV / total_N1 + p_NV * (shorter_N1 / total_N1)
        return p_NV

    def found(self, nodes: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the contexts ``nodes``, in any shape: how often anything followed, how many different tokens
        did, and how often the one in ``following`` did; float32 of whole numbers."""
        pairs = nodes * self.vocabulary + following
        place = torch.searchsorted(self.pairs_E, pairs).clamp(max=len(self.pairs_E) - 1)
        same = torch.where(self.pairs_E[place] == pairs, self.counts_E[place], 0)
        total = self.before_E[self.begins[nodes + 1]] - self.before_E[self.begins[nodes]]
        different = self.begins[nodes + 1] - self.begins[nodes]
        return total.float(), different.float(), same.float()

    def counts(self, node_N: Tensor) -> Tensor:
        """How often every token followed: ``N V`` float32 of whole numbers."""
        first_N = self.begins[node_N]
        many_N = self.begins[node_N + 1] - first_N
        line_E = torch.repeat_interleave(torch.arange(len(node_N), device=node_N.device), many_N)
        begin_N = many_N.cumsum(0) - many_N
        pair_E = torch.arange(len(line_E), device=node_N.device) + (first_N - begin_N)[line_E]
        counts_NV = torch.zeros(len(node_N), self.vocabulary, device=node_N.device)
        counts_NV[line_E, self.tokens_E[pair_E]] = self.counts_E[pair_E].float()
        return counts_NV


def _take_out(counts_NV: Tensor, node_N: Tensor, following_BT: Tensor, segment_BT: Tensor) -> None:
    """From each position's counts what the position's own caption added to them."""
    rows, tokens = following_BT.shape
    node_BT = node_N.view(rows, tokens)
    segment_BT = segment_BT.masked_fill(node_BT == 0, -1)
    same_BTT = (node_BT[:, :, None] == node_BT[:, None]) & (segment_BT[:, :, None] == segment_BT[:, None])
    b, t, other = (same_BTT & (segment_BT >= 0)[:, :, None]).nonzero(as_tuple=True)
    # whole numbers: their sums are exact in any order
    minus_one = torch.tensor(-1.0, device=counts_NV.device)
    counts_NV.index_put_((b * tokens + t, following_BT[b, other]), minus_one, accumulate=True)
    counts_NV.clamp_(min=0)


class PriorHead(CaptionHead):
    """What a network adds to the log-probabilities of the prior, and how far back it looks at each place.

    ``back_off`` gives the strengths of ``PriorTable``; it begins with those of Witten and Bell. A sample has
    ``media_tokens`` positions before its text.
    """

    def __init__(
        self, vocabulary: int, width: int, tied_to: nn.Parameter | None, table: PriorTable, media_tokens: int
    ) -> None:
        super().__init__(vocabulary, width, tied_to)
        self.table, self.media_tokens = table, media_tokens
        self.back_off = nn.Linear(width, table.order + 1)
        nn.init.zeros_(self.back_off.weight)
        nn.init.zeros_(self.back_off.bias)

    def forward(self, row: Row) -> Tensor:  # type: ignore[override]
        _, x_BTD, prior_BTV = self.prior(row)
        return F.linear(x_BTD, self.weight) + prior_BTV

    def prior(self, row: Row) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The row's text for ``PriorTable``, what the network makes of it (normed, B T D), and the prior."""
        first = row["media"]
        segment_BT, position_BT = row["segment"][:, first:], row["position"][:, first:] - self.media_tokens
        x_BTD = self.norm(row["x"][:, first:])
        text = {"tokens": row["tokens"], "segment": segment_BT, "position": position_BT}
        prior_BTV: Tensor = self.table(text, self.back_off(x_BTD).float())
        return text, x_BTD, prior_BTV

    def prior_after(self, x_D: Tensor, text: Sequence[int], seen_C: Tensor | None = None) -> Tensor:
        """``V``: the prior's part of what ``forward`` has for the last token of ``text``, which is a
        language's and a caption's so far; ``x_D`` is what came in for it, ``seen_C`` what is seen of
        categories, for a head that takes it."""
        strengths_1L: Tensor = self.back_off(self.norm(x_D[None]))
        return self.table.following(text, strengths_1L[0].float())


def table_of(source: str, order: int, vocabulary: int) -> PriorTable:
    """Of the training captions of the curated set in ``source``. Raises ValueError."""
    if order < 1:
        raise ValueError(f"the model's prior_order is {order}: it must be at least 1")
    curated = open_set(source)
    tokenizer = curated.tokenizer
    if tokenizer.vocabulary > vocabulary:
        raise ValueError(
            f"the model's vocabulary ({vocabulary}) is smaller than that of its prior "
            f"({tokenizer.vocabulary}): raise it to {tokenizer.vocabulary}"
        )
    rows = curated.table("train", ["language", "tokens"]).to_pydict()
    texts = [
        (tokenizer.language(code), *tokens)
        for code, tokens in zip(rows["language"], rows["tokens"], strict=True)
    ]
    return PriorTable(texts, order=order, vocabulary=vocabulary, end=tokenizer.end)
