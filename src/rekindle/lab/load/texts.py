"""Texts of about so many tokens, drawn by name: the same seed and name give the same text, whatever else is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

TOKENS_PER_WORD = 1.4  # where a server does not tell

_WORD_LIST = """
about above across after again against almost along already also although always among another answer apple around
arrive autumn baker barn basket because become before begin behind below beside better between beyond bird black
blue boat book both bread bridge bright bring brother brown build candle carry castle cause century change cheese
child choose circle city clear clock close cloud coat cold corner cottage count country cover cross dark daughter
deep different distance doctor door dozen dream dress dry early earth east edge eight either empty enough evening
every family farmer father field figure finger finish fire first fish flower follow forest forget four friend front
garden general gentle ghost glass gold grain grass great green ground hand happen harbour heavy hill history honey
horse hour house hundred island january journey kitchen know ladder lake lamp language large late laugh learn left
letter light line listen little long market matter meadow measure message middle mile mill minute mirror month
moon morning mother mountain move music name narrow nature near needle never night nine north number ocean offer
often open orange order other outside paper path people picture place plain plant please point poor potter present
pretty prince promise question quick quiet rain reach ready remember rest rich right river road roof room round
sailor salt school season second seven shadow sharp sheep ship shoe short silver simple singer sister sleep slow
small smile smoke snow soldier song south spoon spring square stable stand station stone story street strong
summer sweet table tailor thing third thousand thread three through today together tower train travel tree
twelve uncle under until valley village voice wagon walk wall water weather week wheel white window winter wonder
wooden word yellow yesterday young
"""
WORDS = tuple(_WORD_LIST.split())


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Draws texts for one tokenizer."""

    seed: int
    tokens_per_word: float = TOKENS_PER_WORD

    def text(self, name: str, num_tokens: int) -> str:
        """Words that make about `num_tokens` tokens; at least one."""
        return words(f"{self.seed}/{name}", max(1, round(num_tokens / self.tokens_per_word)))


def words(name: str, count: int) -> str:
    """So many words in a row."""
    return " ".join(Random(name).choices(WORDS, k=count))
