"""What a picture's category tells of its caption: the n-gram prior of each category's captions, as tables.

What is seen says how likely each category is, and every token makes it more or less so (Bayes' rule). The
prior is the mixture of what captions of each category tell: what follows in those alone is interpolated with
what follows in all (as ``jobs.captions.prior``'s ``told_prior`` does). Nobody has to be told the category:
in training it is the target of what is seen, and says from which counts a caption's own are taken out. The
categories are the kinds of the set (``CuratedSet.kinds``).

Shape suffixes as in ``jobs.models.caption_prior``; K slots of a row, C categories, U nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.data.curated import open_set
from jobs.models import gpt
from jobs.models.caption_prior import PriorHead, PriorTable, table_of
from jobs.models.captioner import Row

SMOOTHING, PULL = 3.0, 8.0
"""Strengths, as ``jobs.captions.prior`` has them: of shorter contexts against longer ones, and of what is
said of all categories against what is said of one."""


class CategoryTable(PriorTable):
    """As ``PriorTable``, with the captions of each category apart: ``texts`` come with their category, of
    which there are ``categories``."""

    captions_C: Tensor

    def __init__(
        self,
        texts: Sequence[tuple[int, Sequence[int]]],
        *,
        categories: int,
        order: int,
        vocabulary: int,
        end: int,
    ) -> None:
        apart = [(category * vocabulary + text[0], *text[1:]) for category, text in texts]
        super().__init__(
            apart, order=order, vocabulary=vocabulary, end=end, languages=categories * vocabulary
        )
        self.categories = categories
        counts_C = torch.bincount(torch.tensor([category for category, _ in texts]), minlength=categories)
        self.register_buffer("captions_C", counts_C, persistent=False)

    def log_shares(self) -> Tensor:
        """``C`` float32: how common each category is."""
        return (self.captions_C.float() / self.captions_C.sum()).log()

    def nodes_of_all(self, language_N: Tensor, history_NO: Tensor) -> Tensor:
        """``N C L``: the nodes of each context in each category."""
        category_C = torch.arange(self.categories, device=language_N.device)
        language_NC = language_N[:, None] + category_C * self.vocabulary
        nodes = self.nodes(language_NC.flatten(), history_NO.repeat_interleave(self.categories, dim=0))
        return torch.stack(nodes, dim=-1).view(*language_NC.shape, -1)


class Counts(NamedTuple):
    """Of contexts: how often anything followed, how many different tokens did, and how often the one that
    follows here; float32 of whole numbers, all of one shape."""

    total: Tensor
    different: Tensor
    same: Tensor

    def without(self, own: Counts) -> Counts:
        return Counts(*(mine - taken for mine, taken in zip(self, own, strict=True)))

    def shares(self, strength: float) -> tuple[Tensor, Tensor]:
        """What one count weighs in each of the last dimension's contexts, from the shortest on, and what is
        left for what was not counted (without that dimension), by Witten and Bell's rule."""
        beyond = self.different * strength + (self.total == 0)
        total = self.total + beyond
        left = beyond / total
        after = [torch.ones_like(left[..., 0])]
        for length in reversed(range(left.shape[-1])):
            after.append(after[-1] * left[..., length])
        return torch.stack(after[-2::-1], dim=-1) / total, after[-1]


class CategoryHead(PriorHead):
    """A ``PriorHead`` whose prior is the mixture over categories of which ``table`` is told all captions and
    ``apart`` those of each.

    Of a row it takes ``seen`` (B K C: logits beside what is common) and, in training, ``category`` (B K, -1
    for a slot without sample). Its output is then ``logits``, ``guess`` (B K C: log-probabilities of the
    picture's category) and ``category``; otherwise the logits, whatever the row says.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        tied_to: nn.Parameter | None,
        table: PriorTable,
        apart: CategoryTable,
        media_tokens: int,
    ) -> None:
        super().__init__(vocabulary, width, tied_to, table, media_tokens)
        self.apart = apart

    def forward(self, row: Row) -> Any:  # type: ignore[override]
        if self.training and "category" not in row:
            raise ValueError("the model learns categories but the data tell none: set the data's categories")
        category_BK = row["category"] if self.training else None
        text, x_BTD, prior_BTV = self.prior(row)
        guess_BKC = (row["seen"].float() + self.apart.log_shares()).log_softmax(dim=-1)
        with torch.autocast(x_BTD.device.type, enabled=False):  # as for the prior: counts are whole numbers
            mixed_BTV = _mixed(prior_BTV, *self._apart(text, guess_BKC, category_BK))
        logits_BTV = F.linear(x_BTD, self.weight) + mixed_BTV
        if category_BK is None:
            return logits_BTV
        return {"logits": logits_BTV, "guess": guess_BKC, "category": category_BK}

    def prior_after(self, x_D: Tensor, text: Sequence[int], seen_C: Tensor | None = None) -> Tensor:
        assert seen_C is not None
        prior_V = super().prior_after(x_D, text)
        device = x_D.device
        row = {
            "tokens": torch.tensor([list(text)], device=device),
            "segment": torch.zeros(1, len(text), dtype=torch.int64, device=device),
            "position": torch.arange(len(text), device=device)[None],
        }
        guess_C = (seen_C.float() + self.apart.log_shares()).log_softmax(dim=-1)
        rest_BT1, counted_BTV = self._apart(row, guess_C[None, None], None, last=True)
        return _mixed(prior_V, rest_BT1[0, -1], counted_BTV[0, -1])

    def _apart(
        self, text: dict[str, Tensor], guess_BKC: Tensor, category_BK: Tensor | None, *, last: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Of every position (only the ``last``): how much the prior of all captions is to weigh (B T 1), and
        what captions of the categories add to it (B T V). With ``category_BK`` without a caption's own."""
        apart, segment_BT = self.apart, text["segment"]
        following_BT = self.table.what_follows(text)
        language_N, history_NO = self.table.contexts(text)
        nodes_BTCL = apart.nodes_of_all(language_N, history_NO)
        nodes_BTCL = nodes_BTCL.view(*segment_BT.shape, *nodes_BTCL.shape[1:])
        counts = Counts(*apart.found(nodes_BTCL, following_BT[..., None, None]))
        all_BTL = torch.stack(self.table.nodes(language_N, history_NO), dim=-1).view(*segment_BT.shape, -1)
        of_all = Counts(*self.table.found(all_BTL, following_BT[..., None]))
        slot_BT = segment_BT.clamp(min=0)
        mine_BTC1 = same_BTTL = None
        if category_BK is not None:
            of_all = of_all.without(_own(_same(all_BTL, segment_BT), following_BT, of_all.same))
            category_BT = category_BK.gather(1, slot_BT)[..., None]
            mine_BTC1 = (category_BT == torch.arange(apart.categories, device=slot_BT.device))[..., None]
            same_BTTL = _same((nodes_BTCL * mine_BTC1).sum(dim=2), segment_BT)
            own = _own(same_BTTL, following_BT, (counts.same * mine_BTC1).sum(dim=2))
            counts = counts.without(Counts(*(part[:, :, None] * mine_BTC1 for part in own)))
        share_BTL, unseen_BT = of_all.shares(SMOOTHING)
        plain_BT = (share_BTL * of_all.same).sum(dim=-1) + unseen_BT / apart.vocabulary
        share_BTCL, rest_BTC = counts.shares(PULL)
        told_BTC = ((share_BTCL * counts.same).sum(dim=-1) + rest_BTC * plain_BT[..., None]).log()
        belief_BTC = _belief(guess_BKC, told_BTC, segment_BT)
        if last:
            nodes_BTCL, share_BTCL = nodes_BTCL[:, -1:], share_BTCL[:, -1:]
            belief_BTC, rest_BTC = belief_BTC[:, -1:], rest_BTC[:, -1:]
        share_BTCL = share_BTCL * belief_BTC[..., None]
        counted_BTV = self._counted(nodes_BTCL, share_BTCL)
        if mine_BTC1 is not None and same_BTTL is not None:
            share_BTL = (share_BTCL * mine_BTC1).sum(dim=2)
            taken_BTT = torch.einsum("btl,btul->btu", share_BTL, same_BTTL.to(share_BTL.dtype))
            following_BTV = F.one_hot(following_BT, apart.vocabulary).to(share_BTL.dtype)
            counted_BTV = (counted_BTV - torch.matmul(taken_BTT, following_BTV)).clamp(min=0)
        return (belief_BTC * rest_BTC).sum(dim=-1, keepdim=True), counted_BTV

    def _counted(self, nodes_BTCL: Tensor, share_BTCL: Tensor) -> Tensor:
        """``B T V``: the counts of each position's nodes, weighed and added up. As one product of matrices,
        whose sums have one order; but for the empty node 0 a position has no node twice."""
        nodes_U, place_BTCL = torch.unique(nodes_BTCL, return_inverse=True)
        places_NX, shares_NX = place_BTCL.flatten(2).flatten(0, 1), share_BTCL.flatten(2).flatten(0, 1)
        shares_NU = shares_NX.new_zeros(len(places_NX), len(nodes_U)).scatter(1, places_NX, shares_NX)
        counted_NV = torch.matmul(shares_NU, self.apart.counts(nodes_U))
        return counted_NV.view(*nodes_BTCL.shape[:2], -1)


def _mixed(prior: Tensor, rest: Tensor, counted: Tensor) -> Tensor:
    return (prior.exp() * rest + counted).log()


def _belief(guess_BKC: Tensor, told_BTC: Tensor, segment_BT: Tensor) -> Tensor:
    """``B T C``: how likely each category is by what is seen and by the tokens up to each position;
    ``told_BTC`` is the log-probability of what follows it in captions of each."""
    places_T = torch.arange(segment_BT.shape[1], device=segment_BT.device)
    earlier_BTT = (segment_BT[:, :, None] == segment_BT[:, None]) & (places_T < places_T[:, None])
    slots_K = torch.arange(guess_BKC.shape[1], device=segment_BT.device)
    slot_BTK = (segment_BT[..., None] == slots_K).to(guess_BKC.dtype)
    read_BTC = torch.matmul(earlier_BTT.to(told_BTC.dtype), told_BTC)
    return (torch.matmul(slot_BTK, guess_BKC) + read_BTC).softmax(dim=-1)


def _same(nodes_BTL: Tensor, segment_BT: Tensor) -> Tensor:
    """``B T T L``: which positions of the same sample have the same context."""
    sample_BTT = (segment_BT[:, :, None] == segment_BT[:, None]) & (segment_BT >= 0)[:, None]
    return sample_BTT[..., None] & (nodes_BTL[:, :, None] == nodes_BTL[:, None]) & (nodes_BTL > 0)[:, None]


def _own(same_BTTL: Tensor, following_BT: Tensor, count_BTL: Tensor) -> Counts:
    """What a position's own caption adds to its contexts' counts; ``count_BTL``: how often what follows
    here did in all."""
    alike_BTTL = same_BTTL & (following_BT[:, :, None] == following_BT[:, None])[..., None]
    alike_BTL = alike_BTTL.sum(dim=2)
    earlier_TT = torch.ones_like(alike_BTTL[0, :, :, 0]).tril(-1)
    # nobody else has that token there: it counts once for all of the caption's own
    only_BTL = (alike_BTL == count_BTL) & ~(alike_BTTL & earlier_TT[..., None]).any(dim=2)
    different_BTL = (same_BTTL & only_BTL[:, None]).sum(dim=2)
    return Counts(same_BTTL.sum(dim=2).float(), different_BTL.float(), alike_BTL.float())


def category_loss(output: Any, targets_BT: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """That of ``jobs.models.gpt``; in training with ``weight`` times the cross entropies of the categories,
    each picture's counted once for every sample that shows it. What is held out has the captions' alone."""
    if isinstance(output, Tensor):
        return gpt.loss(output, targets_BT)
    total, count = gpt.loss(output["logits"], targets_BT)
    guess_NC = output["guess"].flatten(0, -2)
    return total + weight * F.nll_loss(
        guess_NC, output["category"].flatten(), ignore_index=-1, reduction="sum"
    ), count


def prior_head(
    source: str,
    order: int,
    weight: float,
    vocabulary: int,
    width: int,
    tied_to: nn.Parameter | None,
    media_tokens: int,
) -> tuple[PriorHead, gpt.Loss]:
    """The head that starts from the prior of the curated set in ``source``, and the loss; with ``weight``
    above 0 from that of its categories. Raises ValueError."""
    table = table_of(source, order, vocabulary)
    if not weight:
        return PriorHead(vocabulary, width, tied_to, table, media_tokens), gpt.loss
    curated = open_set(source)
    tokenizer, (kinds, numbers) = curated.tokenizer, curated.kinds()
    rows = curated.table("train", ["language", "tokens"]).to_pylist()
    apart = CategoryTable(
        [
            (number, (tokenizer.language(row["language"]), *row["tokens"]))
            for number, row in zip(numbers.tolist(), rows, strict=True)
        ],
        categories=len(kinds),
        order=order,
        vocabulary=vocabulary,
        end=tokenizer.end,
    )
    head = CategoryHead(vocabulary, width, tied_to, table, apart, media_tokens)
    return head, partial(category_loss, weight=weight)
