"""Prompts of the four kinds of work that `benchmarks.speculation` measures; none is packaged with `slipstream distill`.

A round of it asks for at most 1224 of a kind, and each has more than that before one comes again.
"""

from __future__ import annotations

from collections.abc import Callable

TOPICS = (
    *("a weekend in Lisbon", "learning to sail", "repairing a bicycle", "the moons of Jupiter", "keeping bees"),
    *("writing a letter of complaint", "old lighthouses", "teaching a dog to sit", "saving water at home"),
    *("cooking for ten people", "sleeping better", "the first railways", "choosing a laptop", "planting an oak"),
    *("baking rye bread", "the rules of curling", "renting a flat abroad", "how glaciers form", "a first aquarium"),
    *(
        "night photography",
        "board games of old Egypt",
        "making candles",
        "walking in the Alps",
        "writing a short speech",
    ),
    *(
        "growing tomatoes on a balcony",
        "the port of Rotterdam",
        "how vaccines are tested",
        "speaking in front of people",
    ),
    *("insulating an attic", "the Baltic Sea", "painting a wooden fence", "learning Portuguese", "how batteries age"),
    *("a picnic in the rain", "the life of otters", "remembering names", "a vegetarian barbecue", "how owls hunt"),
    *("how bridges are inspected", "restoring old chairs", "the invention of printing", "a long train journey"),
    "sharing a kitchen",
)
ASKED = (
    "Tell me something about {topic}. I have {minutes} minutes.",
    "What should I know about {topic}? My friend {name} will ask me.",
    "Give me some advice on {topic} for someone who is {age} years old.",
    "Write an e-mail to {name} about {topic}.",
    "What do people most often get wrong about {topic}? Name {minutes} things.",
    "I read about {topic} yesterday, and {name} did not believe me. Explain it to both of us.",
    "Imagine a talk of {minutes} minutes about {topic}. How would you begin?",
    "{name} wants to write an article about {topic}. What could be in it?",
)
PLACES = ("Ostrava Bay", "Port Ellen", "Kinsale", "Gdynia", "Vardø", "Trieste", "Piran", "Brest", "Sines")
NAMES = ("Ada", "Bruno", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Katya")


def chat(index: int) -> str:
    name = NAMES[index % len(NAMES)]
    asked, topic = ASKED[index % len(ASKED)], TOPICS[index % len(TOPICS)]
    return asked.format(topic=topic, name=name, minutes=index % 11 + 2, age=index % 11 + 20)


def quote(index: int) -> str:
    place, year = PLACES[index % len(PLACES)], 1800 + 7 * index % 190
    return (
        "Summarize this text. Quote the sentences that you use word for word.\n\n"
        f"The harbour of {place} was built in {year} by a company of engineers from the north. It has two basins, a "
        f"long breakwater of grey stone and a lighthouse whose lamp was replaced in {year + 58}. Fishing boats leave "
        "before dawn and return in the afternoon; the market opens at four o'clock. In winter, storms close the "
        f"harbour for days, and the people of {place} mend their nets and repair the engines of their boats."
    )


def edit(index: int) -> str:
    name, count = NAMES[index % len(NAMES)].lower(), index % 9 + 3
    return (
        f"Rename the variable `total` to `amount` in {name}'s code and answer with the whole code only.\n\n"
        f"```python\ndef bill_of_{name}_{index}(orders, tax={count / 100}):\n    total = 0\n"
        "    for order in orders:\n"
        "        price = order.price * order.count\n"
        f"        if order.count > {count}:\n            price = price * 0.9\n"
        "        total = total + price\n    total = total * (1 + tax)\n    return round(total, 2)\n```"
    )


def extraction(index: int) -> str:
    name, place = NAMES[index % len(NAMES)], PLACES[index % len(PLACES)]
    return (
        "Write this list as a JSON array of objects with the keys name, place, boat and length.\n\n"
        f"{name} of {place} owns the boat Seagull {index}, which is {index % 9 + 8} metres long. "
        f"{NAMES[(index + 3) % len(NAMES)]} of {PLACES[(index + 2) % len(PLACES)]} owns the boat Heron {index + 5}, "
        f"which is {index % 5 + 11} metres long. {NAMES[(index + 5) % len(NAMES)]} of {place} owns the boat "
        f"Cormorant {index + 9}, which is {index % 6 + 7} metres long."
    )


KINDS: dict[str, Callable[[int], str]] = {
    "chat": chat,
    "summarise and quote": quote,
    "code edit": edit,
    "JSON extraction": extraction,
}
