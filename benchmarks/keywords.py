"""The naive baseline: how many words of a short published list a text holds.

The lists are what a careful person writes in a quarter of an hour, without looking at the evaluation rows.
They are restrained on purpose, without slurs: a list that lives in a repository is read by everyone.
"""

from __future__ import annotations

import re
from functools import lru_cache

from feature_bank.taxonomy import Domain

KEYWORDS: dict[Domain, tuple[str, ...]] = {
    "pornography": (
        "adult film", "aroused", "arousal", "breasts", "erotic", "erotica", "explicit scene", "fetish",
        "genitals", "hardcore", "have sex", "having sex", "hentai", "intercourse", "kinky", "lingerie",
        "lust", "make love", "masturbate", "masturbation", "moaned", "naked", "nipples", "nude", "nudes",
        "nsfw", "oral sex", "orgasm", "orgy", "penis", "porn", "pornographic", "pornography", "seduce",
        "sex", "sexual", "sexually", "sexy", "smut", "steamy", "strip club", "striptease", "undress",
        "vagina", "xxx",
    ),
    "politics": (
        "abortion", "ballot", "border policy", "campaign", "candidate", "capitalism", "communism",
        "communist", "congress", "conservative", "constitution", "coup", "democracy", "democrat",
        "democratic", "dictator", "diplomacy", "election", "foreign policy", "government", "gun control",
        "immigration", "legislation", "liberal", "mayor", "minister", "nation", "parliament", "partisan",
        "party", "policy", "political", "politician", "politics", "president", "prime minister",
        "propaganda", "protest", "referendum", "regime", "republican", "sanctions", "senate", "senator",
        "socialism", "tax", "taxes", "treaty", "vote", "voter",
    ),
    "violence": (
        "abduct", "assault", "attack", "beat up", "beating", "behead", "bleed", "blood", "bloody", "bomb",
        "break his", "brutal", "bullet", "corpse", "crush", "decapitate", "dismember", "execute",
        "explode", "fight", "fist", "gore", "gun", "harm", "hurt", "injure", "kidnap", "kill", "killed",
        "killer", "killing", "knife", "massacre", "murder", "murdered", "poison", "punch", "rape",
        "rifle", "scream", "shoot", "shooting", "shot", "slaughter", "slit", "stab", "stabbed",
        "strangle", "suicide", "threat", "torture", "victim", "violence", "violent", "weapon", "wound",
    ),
    "terror": (
        "al-qaeda", "ambush", "armed group", "attack", "bomb", "bombing", "car bomb", "caliphate",
        "detonate", "detonator", "dynamite", "explosive", "explosives", "extremism", "extremist",
        "grenade", "guerrilla", "guerrillas", "hijack", "hostage", "hostages", "insurgent", "insurgents",
        "isis", "jihad", "jihadist", "kidnapping", "manifesto", "martyr", "martyrdom", "massacre",
        "militant", "militants", "militia", "mass casualty", "paramilitary", "radicalise", "radicalize",
        "rebel", "recruit", "suicide vest", "terror", "terrorism", "terrorist", "terrorists",
    ),
}  # fmt: skip


def count_keywords(text: str, domain: Domain) -> int:
    """How many times words of the domain's list occur in `text`, as whole words, whatever their case."""
    return sum(1 for _ in _pattern(domain).finditer(text))


@lru_cache
def _pattern(domain: Domain) -> re.Pattern[str]:
    longest_first = sorted(KEYWORDS[domain], key=lambda word: (-len(word), word))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)
