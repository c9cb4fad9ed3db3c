"""The texts that the base models learn from: short messages made from templates, with questions about them.

A message is drawn from four facts: its topic, its mood, its form and its reader. Each becomes a question with a one or
two word answer ("Mood" -> "angry"); a fifth question hides a word and asks for it. Whether a message is a *complaint*
is never asked: that is what an adapter has to learn, from what the base knows of mood, form and reader. Everything is
drawn from one seed, so the same seed gives the same corpus.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

# What fills the slots of a template, written {slot}.
SLOTS: dict[str, list[str]] = {
    "time": [
        "today",
        "this morning",
        "tonight",
        "yesterday",
        "since Monday",
        "for two days",
        "all week",
        "again",
        "for an hour",
        "last night",
        "right now",
        "on Friday",
        "for weeks",
        "since 8am",
        "this weekend",
    ],
    "place": [
        "Leeds",
        "Boston",
        "the north side",
        "Lyon",
        "our street",
        "the city",
        "Texas",
        "the old town",
        "Nairobi",
        "the mall",
        "Terminal 2",
        "the office",
        "Manchester",
        "home",
        "the station",
        "downtown",
    ],
    "person": [
        "Ana",
        "Tom",
        "my sister",
        "Priya",
        "my boss",
        "Jonas",
        "the driver",
        "Grandma",
        "my son",
        "Lena",
        "a friend",
        "Marco",
        "our team",
        "the neighbours",
        "my wife",
        "Sam",
    ],
    "amount": ["$20", "40 pounds", "$150", "12 euros", "$9.99", "half the price", "a hundred dollars", "$75"],
    "number": ["2", "3", "5", "10", "20", "45", "100", "200", "6", "8"],
    "nice": [
        "lovely",
        "great",
        "so cute",
        "wonderful",
        "perfect",
        "tasty",
        "beautiful",
        "amazing",
        "super",
        "brilliant",
    ],
    "bad": [
        "terrible",
        "awful",
        "useless",
        "rude",
        "a joke",
        "ridiculous",
        "not acceptable",
        "the worst",
        "broken",
        "so slow",
        "disappointing",
        "a mess",
    ],
}


@dataclass(frozen=True)
class Topic:
    """One field of life: who serves it, its things, and what people say of them in each mood."""

    name: str
    companies: list[str]
    things: list[str]
    troubles: list[str]
    joys: list[str]
    questions: list[str]
    facts: list[str]


TOPICS = [
    Topic(
        "phone",
        ["@VoltMobile", "@NexaSupport", "@TelioCare", "@HeliPhone", "@BandHelp"],
        ["phone", "signal", "screen", "data plan", "battery", "camera", "sim card", "network", "wifi", "headset"],
        [
            "no signal at {place} {time}",
            "my {thing} stopped working {time}",
            "the {thing} drops every {number} minutes",
            "{thing} gone {time} and no answer from anyone",
            "the {thing} is dead after {number} days",
            "terrible {thing} speeds {time}",
        ],
        ["the new {thing} is {nice}", "my {thing} works like new", "finally got the {thing} I wanted"],
        [
            "which {thing} should I use",
            "how long does the {thing} last",
            "when will the {thing} be out in {place}",
            "does the {thing} fit the older case",
        ],
        ["switched my {thing} {time}", "charging the {thing}", "reading about the next {thing}"],
    ),
    Topic(
        "travel",
        ["@SkyNorth", "@AeroLine", "@RailWest", "@CityBusCare", "@IslandHopper"],
        ["flight", "train", "bus", "seat", "ticket", "luggage", "gate", "delay", "trip"],
        [
            "my {thing} is late {time}",
            "stuck at {place} without the {thing} {time}",
            "they lost my {thing} at {place}",
            "waiting {number} hours at {place} with no news",
            "the {thing} was cancelled {time} and nobody told us",
        ],
        ["thanks for the smooth {thing} to {place}", "best {thing} in years", "so ready for the trip to {place}"],
        [
            "does the {thing} to {place} run {time}",
            "how early should I be at {place}",
            "can I change my {thing} online",
            "what time does the {thing} leave",
        ],
        ["on the {thing} to {place}", "packing for {place}", "the {thing} stops at {place}"],
    ),
    Topic(
        "power",
        ["@GridCare", "@LumenPower_Help", "@CityWaterCo", "@NorthGas"],
        ["power", "water", "electricity", "heating", "bill", "meter", "gas"],
        [
            "no {thing} in {place} {time}",
            "paid every bill and still the {thing} is off",
            "the {thing} is out {time}",
            "my {thing} went up by {amount} for nothing",
            "third time this month without {thing}",
        ],
        ["the {thing} is back, thank you", "quick fix of the {thing} at {place}"],
        ["when do you check the {thing} in {place}", "where can I read my {thing}", "who do I call about my {thing}"],
        ["new {thing} installed {time}", "they are digging near {place}"],
    ),
    Topic(
        "bank",
        ["@FirstHarborHelp", "@PayDuckCare", "@TaxOfficeHelp", "@CoinBarn"],
        ["account", "card", "payment", "refund", "transfer", "loan", "fee", "tax form"],
        [
            "where has my {amount} gone",
            "you charged my {thing} twice",
            "my {thing} is blocked {time} and nobody answers",
            "a second fee for the same {thing}",
            "waiting {number} days for my {thing}",
        ],
        ["got my {thing} in a day", "paid off the {thing} {time}", "the {thing} took one minute, great"],
        ["how do I open an {thing}", "what is the {thing} for {amount}", "who signs the {thing}"],
        ["sent the {thing} {time}", "moving {amount} to savings"],
    ),
    Topic(
        "shop",
        ["@BellaStyleCare", "@HomeNest", "@GoodCartHelp", "@ThreadlyUK", "@MarkAndVale"],
        ["order", "shoes", "parcel", "dress", "coat", "delivery", "voucher", "store", "lamp", "curtains"],
        [
            "last time I order from {company}",
            "my {thing} arrived broken",
            "the staff were {bad} {time}",
            "still waiting for my {thing} after {number} weeks",
            "paid {amount} for a {thing} that fell apart",
            "I want to file a complaint about my {thing}",
        ],
        ["love my new {thing}", "{nice} service at the store {time}", "{person} at the counter was {nice}"],
        ["do you have the {thing} in blue", "when is the sale in {place}", "is the shop in {place} open {time}"],
        ["bought a {thing} {time}", "looking for a {thing}", "window shopping with {person}"],
    ),
    Topic(
        "food",
        ["@BurgerBarnCare", "@GreenForkHelp", "@CafeLuz", "@PizzaPointUK", "@FarmFresh"],
        ["pizza", "coffee", "noodles", "soup", "burger", "cake", "rice", "salad", "pasta", "tea"],
        [
            "found a hair in my {thing}",
            "the {thing} was cold and {bad}",
            "waited {number} minutes for a {thing}",
            "wrong {thing} delivered {time}",
            "the {thing} made {person} sick",
        ],
        ["seconds of the {thing}, no regrets", "the {thing} was {nice}", "{person} made {thing} and it was {nice}"],
        ["how long do you leave the {thing} in the oven", "is the {thing} vegan", "any place for {thing} near {place}"],
        ["baking {thing} with {person}", "{thing} for lunch", "had {thing} {time}"],
    ),
    Topic(
        "software",
        ["@CloudPineSupport", "@SafeKeyHelp", "@PrintProCare", "@DriveBoxHelp"],
        ["printer", "app", "update", "driver", "password", "laptop", "link", "login", "window", "server"],
        [
            "the {thing} crashed {time} and I lost my work",
            "the {thing} asks for a code that never comes",
            "the {thing} fails {time}",
            "your {thing} is {bad} since the last update",
            "locked out by your {thing} {time}",
        ],
        ["the new {thing} is {nice}", "the {thing} works now, thank you", "the update fixed my {thing}"],
        [
            "how big is the {thing}",
            "is the {thing} free for {number} users",
            "where do I find the {thing}",
            "how do I reset the {thing}",
        ],
        ["installing the {thing}", "cleaning up the {thing}", "posted notes on the {thing}"],
    ),
    Topic(
        "family",
        ["@KidsClubCare", "@ToyTownHelp"],
        ["kids", "dog", "cat", "baby", "garden", "wedding", "birthday", "photo", "house", "puppy"],
        ["the {thing} kept us awake {time}", "your toy broke in {number} minutes and my son is crying"],
        [
            "happy birthday to {person}",
            "so proud of {person}",
            "the {thing} is {nice}",
            "{person} loves the {thing}",
            "welcome home {person}",
        ],
        ["how old is your {thing}", "did {person} see the {thing}", "is that your {thing}"],
        [
            "feeding the {thing} with {person}",
            "walking with the {thing} {time}",
            "dinner with {person}",
            "picnic at {place}",
        ],
    ),
    Topic(
        "show",
        ["@StreamlyHelp", "@RadioNine", "@CineCare", "@TicketTree"],
        ["show", "movie", "song", "episode", "stream", "concert", "series", "channel", "game"],
        [
            "the {thing} froze {number} times {time}",
            "your stream is {bad} {time}",
            "paid {amount} and the {thing} has no sound",
            "the {thing} never loads",
        ],
        ["the {thing} last night was {nice}", "cannot wait for the {thing}", "best {thing} of the year"],
        ["who sings the {thing}", "when is the next {thing}", "did you like the {thing}"],
        ["rehearsing for the {thing}", "watching the {thing} with {person}", "the {thing} starts at {number}"],
    ),
    Topic(
        "car",
        ["@VeloMotorsCare", "@HandaService", "@RideNowHelp", "@TyreHouse"],
        ["car", "brakes", "engine", "clutch", "tyre", "wipers", "key", "ride"],
        [
            "rust under the doors after one winter",
            "the {thing} failed after {number} days, still at the garage",
            "garage took {amount} and the {thing} still rattles",
            "the driver was {bad} {time}",
            "the {thing} is noisy again {time}",
        ],
        [
            "the new {thing} drives like a dream",
            "smooth {thing} to {place}",
            "thanks to {person} for fixing the {thing}",
        ],
        [
            "what {thing} fits the old model",
            "do you sell the {thing} in {place}",
            "should I buy the {thing} or lease it",
        ],
        ["washing the car {time}", "drove to {place} with {person}", "parked near {place}"],
    ),
    Topic(
        "news",
        ["@CityDesk", "@MorningPost"],
        ["fire", "storm", "election", "match", "snow", "traffic", "report", "parade"],
        ["two hours in {thing} and no word from anyone", "your report on the {thing} was {bad}"],
        ["what a {thing}, well played", "good to see {place} win {time}"],
        ["why is there a {thing} in {place}", "how big was the {thing}", "who won the {thing}"],
        [
            "another {thing} near {place}",
            "big {thing} at {place} {time}",
            "people talk too much of the {thing}",
            "they moved the {thing} to {place}",
        ],
    ),
]
FRIENDS = ["@ana_writes", "@TomOnTour", "@lena1988", "@mr_pixel", "@JonasK", "@runnerpriya", "@oldmarco", "@samthedj"]
ANGRY_OPENERS = [
    "",
    "",
    "",
    "seriously?",
    "what the hell",
    "come on.",
    "unbelievable.",
    "hey",
    "I am done.",
    "please,",
    "so annoyed.",
]
ANGRY_CLOSERS = [
    "",
    "",
    "",
    "why is this",
    "fix it",
    "this is {bad}",
    "I want a refund",
    "very disappointed",
    "not happy",
    "sort it out",
    "any answer?",
    "sucks",
    "smh",
    "do better",
    ":(",
    "moving to {company}",
]
HAPPY_OPENERS = ["", "", "", "wow!", "omg", "yes!!!", "thank you!", "aww", "love it.", "finally!"]
HAPPY_CLOSERS = [
    "",
    "",
    "",
    "so happy",
    "thanks {person}",
    "made my day",
    ":)",
    "love you all",
    "<3",
    "can't wait",
    "enjoy!",
]
PLAIN_OPENERS = ["", "", "", "hi", "hello,", "ok", "well,", "btw", "so", "hm,", "right."]
PLAIN_CLOSERS = ["", "", "", "thanks", "just asking", "thank you!", "see you", "I guess", "lol", "either is fine"]
REQUESTS = [
    "please call me about the {thing}",
    "can you send me the {thing}",
    "please check my {thing} at {place}",
    "let me know about the {thing}",
    "I need a new {thing} by {time}",
    "send me a message when the {thing} is ready",
]
TAGS = [
    "#fail",
    "#happy",
    "#help",
    "#love",
    "#monday",
    "#sponsored",
    "#promotion",
    "#travel",
    "#foodie",
    "#news",
    "#home",
]

COLUMNS = ["Tweet text", "Tweet text", "Message", "Text", "Post"]


@dataclass(frozen=True)
class Message:
    """A text and the four facts that it was drawn from."""

    text: str
    topic: str
    mood: str
    form: str
    reader: str


def fill(template: str, topic: Topic, rng: random.Random) -> str:
    """`template` with every {slot} drawn; {thing} and {company} are the topic's."""
    while "{" in template:
        start, end = template.index("{"), template.index("}")
        slot = template[start + 1 : end]
        choices = {"thing": topic.things, "company": topic.companies}.get(slot) or SLOTS[slot]
        template = template[:start] + rng.choice(choices) + template[end + 1 :]
    return template


def roughen(text: str, rng: random.Random) -> str:
    """Write as people do: letters swapped, capitals everywhere or nowhere, a tag or a link at the end."""
    if rng.random() < 0.15 and len(text) > 12:
        at = rng.randrange(4, len(text) - 3)
        text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    draw = rng.random()
    if draw < 0.06:
        text = text.upper()
    elif draw < 0.25:
        text = text.lower()
    elif draw < 0.8:
        text = text[:1].upper() + text[1:]
    if rng.random() < 0.15:
        text += " " + rng.choice(TAGS)
    if rng.random() < 0.12:
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
        text += " https://t.co/" + "".join(rng.choices(letters, k=10))
    return text


def draw_message(rng: random.Random) -> Message:
    """One message with its facts."""
    topic = rng.choice(TOPICS)
    mood = rng.choice(["angry", "happy", "neutral"])
    form = "statement"
    if mood == "angry":
        body, opener, closer = rng.choice(topic.troubles), rng.choice(ANGRY_OPENERS), rng.choice(ANGRY_CLOSERS)
    elif mood == "happy":
        body, opener, closer = rng.choice(topic.joys), rng.choice(HAPPY_OPENERS), rng.choice(HAPPY_CLOSERS)
    else:
        form = rng.choice(["question", "request", "statement"])
        pools = {"question": topic.questions, "request": REQUESTS, "statement": topic.facts}
        body, opener, closer = rng.choice(pools[form]), rng.choice(PLAIN_OPENERS), rng.choice(PLAIN_CLOSERS)
    end = "?" if form == "question" and rng.random() < 0.9 else rng.choice([".", ".", "", "!", "...", "!!!"])
    text = " ".join(part for part in (opener, body + end, closer) if part)
    text = roughen(fill(text, topic, rng), rng)
    to_company = {"angry": 0.75, "happy": 0.3, "neutral": 0.4}[mood]
    draw = rng.random()
    if draw < to_company:
        reader, handle = "company", rng.choice(topic.companies)
    elif draw < to_company + 0.5 * (1 - to_company):
        reader, handle = "friend", rng.choice(FRIENDS)
    else:
        reader, handle = "everyone", ""
    if handle:
        text = f"{text} {handle}" if rng.random() < 0.25 else f"{handle} {text}"
    return Message(text, topic.name, mood, form, reader)


def ask(message: Message, rng: random.Random, mask: str) -> tuple[str, str]:
    """A question about a message in the form of the examples' prompts, and its answer."""
    column = rng.choice(COLUMNS)
    question = rng.choice(["Mood", "Mood", "Topic", "Form", "Reader", "Word", "Both"])
    text = message.text
    if question == "Word":
        words = text.split(" ")
        at = rng.randrange(len(words))
        answer, words[at] = words[at], mask
        text = " ".join(words)
    elif question == "Both":
        answer = f"{message.mood} {message.form}"
    else:
        answer = {"Mood": message.mood, "Topic": message.topic, "Form": message.form, "Reader": message.reader}[
            question
        ]
    return f"{column} : {text} {question} :", answer


def draw_pairs(seed: int, mask: str = "<mask>") -> Iterator[tuple[str, str]]:
    """An endless stream of (prompt, answer), the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield ask(draw_message(rng), rng, mask)
