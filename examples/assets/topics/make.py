"""Writes topics.csv next to this script: synthetic short sentences on four topics, from templates with slots."""

import csv
import random
from pathlib import Path

DAY = ["today", "tomorrow", "this morning", "on sunday", "last night", "all week"]
TOPICS = {
    "cooking": [
        "{adj} {dish} with {herb}, as my {who} makes it",
        "stir the {dish} {day}, then add {herb} and salt",
        "the {dish} was {adj}, but it wanted more {herb}",
        "bake the {dish} until it is {adj}, then rest it \"covered\"",
    ],
    "sport": [
        "the {team} won the {game} {day}",
        "a {adj} {game}: the {team} lost by two points",
        "{who} ran the last mile of the {game} alone",
        "the coach of the {team}, {adj} as ever, left {day}",
    ],
    "travel": [
        "the {ride} to the {place} was {adj} {day}",
        "we missed the {ride}, and slept in a {place}",
        "a ticket for the {ride}, please: two seats to the {place}",
        "my {who} took a {ride} over the {place} {day}",
    ],
    "weather": [
        "{sky} over the hills {day}",
        "it is {adj} outside, with {sky} {day}",
        "after the {sky} the sun came out, {day}",
        "expect {sky} {day}; stay in if you can",
    ],
}
SLOTS = {
    "adj": ["good", "bad", "cold", "warm", "dull", "fine", "strange", "perfect"],
    "day": DAY,
    "dish": ["soup", "bread", "stew", "pie", "rice", "fish"],
    "game": ["match", "race", "final", "game", "relay"],
    "herb": ["garlic", "pepper", "butter", "lemon", "onion"],
    "place": ["station", "harbour", "island", "hotel", "border"],
    "ride": ["train", "boat", "bus", "plane", "ferry"],
    "sky": ["rain", "snow", "fog", "thunder", "wind", "hail"],
    "team": ["reds", "visitors", "juniors", "champions"],
    "who": ["mother", "brother", "captain", "friend"],
}
# The number of rows of each class; the classes differ in size.
ROWS = {"cooking": 140, "sport": 110, "travel": 90, "weather": 60}


def main():
    rng = random.Random(7)
    rows = set()
    for topic, templates in TOPICS.items():
        wanted, mine = ROWS[topic], set()
        while len(mine) < wanted:
            template = rng.choice(templates)
            mine.add((template.format(**{slot: rng.choice(words) for slot, words in SLOTS.items()}), topic))
        rows |= mine
    rows = sorted(rows)
    rng.shuffle(rows)
    with open(Path(__file__).with_name("topics.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows(rows)


main()
