"""The returns desk: seeded messages of shop customers, and what the shop's policy decides.

A message tells why an item comes back, how long ago it was bought and whether there is a receipt,
in any order and among sentences that do not matter. `decide` is the policy of
`tasks/returns_desk.yaml` as code; `explain` writes the chain of thought that leads to its decision,
which only the quickstart teacher's training reads.

Three sets of sentence frames: those that the quickstart's teacher was trained on; those of train,
validation and the pool, a few of which the teacher never saw, so that it errs as a real one does on a
user's own data; and those that stand in test messages alone.

    python -m pipelines.quickstart.returns_desk      # writes pipelines/quickstart/data/*.jsonl
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LABELS = ("refund", "replace", "repair", "decline")
DAYS = {"day": 1, "week": 7, "month": 30, "year": 365}
LONGEST = {"day": 120, "week": 60, "month": 24, "year": 5}
SPLITS = {"train": 600, "validation": 300, "unlabelled": 1200, "test": 800}
DATA = Path(__file__).parent / "data"

ITEMS = """kettle toaster blender lamp heater vacuum clock radio camera printer keyboard monitor
speaker tablet phone watch drill mixer fan iron grill fridge oven scale router charger
shaver juicer scanner drone television laptop freezer microwave dishwasher doorbell
scooter projector""".split()

# What the teacher's training shows.
_REASONS = {
    "faulty": [
        "The {item} stopped working.",
        "My {item} no longer turns on.",
        "The {item} I have from you is broken on the inside and does nothing.",
        "It worked at first, but now the {item} is dead.",
        "The {item} keeps switching itself off.",
        "There is a fault in the {item}, it fails every time I use it.",
        "The {item} has a defect and makes a terrible noise.",
        "Your {item} does not work any more.",
        "Nothing happens when I use the {item}, it must be faulty.",
        "The {item} broke down all by itself.",
    ],
    "unwanted": [
        "I changed my mind about the {item}.",
        "I do not want the {item} any more.",
        "The {item} works fine, but I do not need it.",
        "I simply do not like the {item}.",
        "The {item} is the wrong colour for my taste.",
        "I was given a second {item}, so I have no use for this one.",
        "The {item} is not for me, although nothing is wrong with it.",
        "I found a cheaper {item} elsewhere and want to give this one back.",
        "We no longer need the {item}.",
        "The {item} turned out to be bigger than I wanted.",
    ],
    "arrived damaged": [
        "The {item} arrived damaged.",
        "When I opened the box, the {item} was already cracked.",
        "The {item} was delivered with a big dent.",
        "The courier handed me a smashed {item}.",
        "The {item} came out of the parcel in pieces.",
        "On delivery the {item} was scratched all over.",
        "The {item} was broken in the post.",
        "The parcel was torn open and the {item} in it was bent.",
        "The {item} reached me with a cracked side.",
        "It was damaged on the way to me, this {item}.",
    ],
    "accident": [
        "I dropped the {item} and it cracked.",
        "I spilled coffee over the {item}.",
        "My dog chewed the {item}.",
        "My son stepped on the {item} and broke it.",
        "I left the {item} out in the rain and it is ruined.",
        "I knocked the {item} off the table.",
        "The {item} fell down the stairs while I carried it.",
        "I drove over the {item} by mistake.",
        "My daughter threw the {item} against the wall.",
        "I broke the {item} myself when I took it apart.",
    ],
}
_TIMES = [
    "I bought it {time} ago.",
    "It was bought {time} ago.",
    "I got it from your shop {time} ago.",
    "It has been {time} since I bought it.",
    "The purchase was {time} ago.",
    "I have had it for {time}.",
    "It is {time} old.",
    "I paid for it {time} ago.",
    "The day I bought it is {time} back.",
    "I have owned it for {time}.",
]
_RECEIPTS = {
    True: [
        "I have the receipt.",
        "The receipt is still in my bag.",
        "I kept the receipt.",
        "I can show you the receipt.",
        "The receipt is in the box.",
        "Of course I still have the receipt.",
        "A photo of the receipt is attached.",
        "I found the receipt in a drawer.",
    ],
    False: [
        "I lost the receipt.",
        "I do not have the receipt.",
        "The receipt is gone.",
        "I threw the receipt away.",
        "There is no receipt any more.",
        "I never got a receipt.",
        "I cannot find the receipt.",
        "Sadly I have no receipt.",
    ],
}
DISTRACTORS = [
    "I have been a customer for {time}.",
    "My neighbour bought the same one {time} ago.",
    "My old {item} lasted {time}.",
    "I waited {time} for an answer on the phone.",
    "I have lived here for {time}.",
    "My birthday was {time} ago.",
    "The shop assistant was very kind.",
    "It was a present for my sister.",
    "I paid by card.",
    "Your shop is my favourite.",
    "The weather has been awful here.",
    "I also like your {item}.",
    "Please answer by email.",
    "My brother has a {item} too.",
    "The box is blue.",
    "I am writing this from work.",
    "The manual is hard to read.",
    "I saw it in your window.",
    "We are moving house soon.",
    "My cat sleeps on the box.",
]
OPENINGS = ["Hello.", "Hi there.", "Good morning.", "Dear shop.", "Dear team.", "Hello, a question."]
CLOSINGS = ["What can you do?", "Thanks.", "Please help.", "Let me know.", "Kind regards.", "What now?"]

# What train, validation and the pool show beyond it.
_FURTHER_REASONS = {
    "faulty": ["My {item} has died.", "The {item} has given up."],
    "unwanted": ["I regret buying the {item}.", "The {item} was a bad idea, I never use it."],
    "arrived damaged": ["Your courier broke the {item}.", "The {item} got crushed in the van."],
    "accident": ["I sat on the {item}.", "The {item} slipped out of my hands and cracked."],
}
_FURTHER_TIMES = ["It has been mine for {time}.", "I bought it about {time} ago."]
_FURTHER_RECEIPTS = {True: ["I did keep the receipt."], False: ["I can no longer find the receipt."]}

# What test shows alone.
_HELD_OUT_REASONS = {
    "faulty": [
        "My {item} no longer works.",
        "My {item} fails every time and is now dead.",
        "The {item} has a fault and stopped working.",
        "The {item} is broken, nothing happens when I use it.",
    ],
    "unwanted": [
        "I have changed my mind and want to give the {item} back.",
        "We do not like the {item}, although it works fine.",
        "I have no need for the {item} any more.",
        "Nothing is wrong with the {item}, I simply do not want it.",
    ],
    "arrived damaged": [
        "The {item} was damaged when the courier delivered it.",
        "The box reached me torn and the {item} was dented.",
        "Out of the parcel came a cracked {item}.",
        "The {item} was smashed on delivery.",
    ],
    "accident": [
        "I stepped on the {item} by mistake.",
        "The {item} fell off the table when I knocked it.",
        "My son spilled tea over the {item}.",
        "My dog knocked the {item} down and it broke.",
    ],
}
_HELD_OUT_TIMES = [
    "I bought it from you {time} ago.",
    "It was {time} ago that I bought it.",
    "I have had it from your shop for {time}.",
]
_HELD_OUT_RECEIPTS = {
    True: ["I still have the receipt in the box.", "The receipt is attached.", "I have the receipt in my bag."],
    False: ["The receipt is lost.", "There is no receipt for it.", "Sadly the receipt is gone."],
}

_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen""".split()
_TENS = """_ _ twenty thirty forty fifty sixty seventy eighty ninety""".split()


@dataclass(frozen=True)
class Frames:
    """Sentence frames for the three things that decide a case."""

    reasons: dict[str, list[str]]
    times: list[str]
    receipts: dict[bool, list[str]]

    def with_further(self, other: "Frames") -> "Frames":
        return Frames(
            {reason: own + other.reasons[reason] for reason, own in self.reasons.items()},
            self.times + other.times,
            {has: own + other.receipts[has] for has, own in self.receipts.items()},
        )


TEACHER_FRAMES = Frames(_REASONS, _TIMES, _RECEIPTS)
FRAMES = TEACHER_FRAMES.with_further(Frames(_FURTHER_REASONS, _FURTHER_TIMES, _FURTHER_RECEIPTS))
TEST_FRAMES = Frames(_HELD_OUT_REASONS, _HELD_OUT_TIMES, _HELD_OUT_RECEIPTS)


@dataclass(frozen=True)
class Case:
    """What a message says: the item, why it comes back, how long ago it was bought, and the receipt."""

    item: str
    reason: str
    count: int
    unit: str
    receipt: bool

    @property
    def days(self) -> int:
        return self.count * DAYS[self.unit]


def decide(reason: str, days: int, receipt: bool) -> str:
    """The label that the policy gives to a return."""
    return _rule(reason, days, receipt)[1]


def explain(case: Case) -> str:
    """The chain of thought that leads from a message to its label, without the answer sentence."""
    why = {
        "faulty": f"The {case.item} does not work, so it is faulty.",
        "unwanted": f"Nothing is wrong with the {case.item}, so it is unwanted.",
        "arrived damaged": f"The {case.item} was damaged on the way, so it arrived damaged.",
        "accident": f"The customer broke the {case.item}, so it is an accident.",
    }[case.reason]
    age = f"It was bought {_amount(case.count, case.unit)} ago"
    age += "." if case.unit == "day" else f", which is {case.days} days."
    receipt = "There is a receipt." if case.receipt else "There is no receipt."
    return f"{why} {age} {receipt} {_rule(case.reason, case.days, case.receipt)[0]}"


def draw_case(rng: random.Random) -> Case:
    """A random case; the four labels are equally likely."""
    wanted = rng.choice(LABELS)
    while True:
        unit = rng.choice(list(DAYS))
        case = Case(
            item=rng.choice(ITEMS),
            reason=rng.choice(list(_REASONS)),
            count=rng.randint(1, LONGEST[unit]),
            unit=unit,
            receipt=rng.random() < 0.5,
        )
        if decide(case.reason, case.days, case.receipt) == wanted:
            return case


def write_message(case: Case, rng: random.Random, frames: Frames = FRAMES, fresh: Frames | None = None) -> str:
    """A customer's message for the case. With `fresh` frames, at least one of its three telling sentences
    has one of them."""
    chosen = [frames] * 3
    if fresh:
        chosen = [fresh if rng.random() < 0.5 else frames for _ in chosen]
        if fresh not in chosen:
            chosen[rng.randrange(3)] = fresh
    reason = rng.choice(chosen[0].reasons[case.reason]).format(item=case.item)
    rest = [
        rng.choice(chosen[1].times).format(time=_spoken(case.count, case.unit, rng)),
        rng.choice(chosen[2].receipts[case.receipt]),
        *(_distractor(rng) for _ in range(rng.randint(0, 2))),
    ]
    rng.shuffle(rest)
    place = rng.randint(0, 1)  # "it" needs the item near the start
    sentences = [*rest[:place], reason, *rest[place:]]
    if rng.random() < 0.4:
        sentences.insert(0, rng.choice(OPENINGS))
    if rng.random() < 0.4:
        sentences.append(rng.choice(CLOSINGS))
    return " ".join(s[0].upper() + s[1:] for s in sentences)


def stream(seed: str, frames: Frames = FRAMES, fresh: Frames | None = None) -> Iterator[tuple[str, Case]]:
    """An endless seeded stream of (message, case)."""
    rng = random.Random(seed)
    while True:
        case = draw_case(rng)
        yield write_message(case, rng, frames, fresh), case


def split(name: str) -> list[dict[str, str]]:
    """The rows of one split, `{"message", "decision"}`; the unlabelled pool has no decision.

    No message stands in two splits, and none twice in one.
    """
    seen: set[str] = set()
    for other, size in SPLITS.items():
        rows: list[dict[str, str]] = []
        for message, case in stream(f"returns-desk/{other}", fresh=TEST_FRAMES if other == "test" else None):
            if len(rows) == size:
                break
            if message in seen:
                continue
            seen.add(message)
            row = {"message": message}
            if other != "unlabelled":
                row["decision"] = decide(case.reason, case.days, case.receipt)
            rows.append(row)
        if other == name:
            return rows
    raise ValueError(f"no split {name!r}; there are {', '.join(SPLITS)}")


def _rule(reason: str, days: int, receipt: bool) -> tuple[str, str]:
    """(the sentence of the policy that applies, its label)."""
    if reason == "unwanted":
        if days > 30:
            return "Unwanted items after 30 days are declined.", "decline"
        if receipt:
            return "Unwanted items within 30 days with a receipt get a refund.", "refund"
        return "Unwanted items within 30 days without a receipt are replaced.", "replace"
    if reason == "faulty":
        if days <= 60:
            if receipt:
                return "Faulty items within 60 days with a receipt get a refund.", "refund"
            return "Faulty items within 60 days without a receipt are replaced.", "replace"
        if days <= 365:
            if receipt:
                return "Faulty items within 365 days with a receipt are replaced.", "replace"
            return "Faulty items within 365 days without a receipt are repaired.", "repair"
        if receipt:
            return "Faulty items after 365 days with a receipt are repaired.", "repair"
        return "Faulty items after 365 days without a receipt are declined.", "decline"
    if reason == "arrived damaged":
        if days <= 14:
            return "Items that arrived damaged within 14 days get a refund.", "refund"
        if days > 90:
            return "Items that arrived damaged after 90 days are declined.", "decline"
        if receipt:
            return "Items that arrived damaged within 90 days with a receipt are replaced.", "replace"
        return "Items that arrived damaged within 90 days without a receipt are repaired.", "repair"
    if days <= 365 and receipt:
        return "Accidents within 365 days with a receipt are repaired.", "repair"
    if receipt:
        return "Accidents after 365 days are declined.", "decline"
    return "Accidents without a receipt are declined.", "decline"


def _distractor(rng: random.Random) -> str:
    unit = rng.choice(list(DAYS))
    time = _spoken(rng.randint(1, LONGEST[unit]), unit, rng)
    return rng.choice(DISTRACTORS).format(item=rng.choice(ITEMS), time=time)


def _amount(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


def _spoken(count: int, unit: str, rng: random.Random) -> str:
    """The amount in digits or in words."""
    if rng.random() < 0.5:
        return _amount(count, unit)
    if count == 1 and rng.random() < 0.5:
        return f"a {unit}"
    return f"{_words(count)} {unit}" + ("s" if count != 1 else "")


def _words(number: int) -> str:
    """A number below 200 in English words."""
    if number >= 100:
        return "a hundred" + (f" and {_words(number - 100)}" if number > 100 else "")
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")


def main() -> None:
    """Write every split to `data/<split>.jsonl`."""
    DATA.mkdir(exist_ok=True)
    for name in SPLITS:
        lines = [json.dumps(row) for row in split(name)]
        (DATA / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(lines)} rows")


if __name__ == "__main__":
    main()
