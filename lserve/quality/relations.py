"""Relations that planted facts are about, by what their values are: no two alike, so that none distracts from another.

A model of 135M parameters finds such facts in 7,500 tokens of real text. Among ten of one relation (`the pass key for
Vienna`, `for Oslo`, ...) it takes one for another, dense or not; larger models do not.
"""

from .vocabulary import CITIES, COLOURS, FIRST_NAMES, JOBS, SURNAMES, WORDS, words

NUMBER_RELATIONS = (
    "phone number of Mr. Lighthouse",
    "pass key for the north gate",
    "code of the blue safe",
    "number of the lost ticket",
    "licence plate of the yellow taxi",
    "price of the antique piano",
    "serial number of the old tractor",
    "weight of the bronze elephant",
    "membership card of Mrs. Dalton",
    "bank account of the fishing club",
    "frequency of the mountain radio",
    "population of the valley",
)

WORD_RELATIONS = (
    ("secret word of the sailors", WORDS),
    ("password of the library", WORDS),
    ("favourite fruit of Mrs. Palmer", words("mango banana cherry lemon apricot coconut peach plum")),
    ("colour of the mayor's coat", COLOURS),
    ("instrument of the young countess", words("violin trumpet harp drum flute guitar cello piano")),
    ("animal on the village flag", words("falcon turtle penguin lion horse wolf bear owl")),
    ("profession of Mr. Winterbottom", JOBS),
    ("flower on the baker's table", words("tulip rose daisy lily orchid sunflower violet iris")),
    ("tool in the hunter's bag", words("hammer compass lantern shovel ladder needle axe rope")),
    ("drink of the tired actors", words("coffee lemonade cider milk brandy tea cocoa wine")),
    ("metal of the royal crown", words("gold silver copper bronze iron platinum tin brass")),
    ("game of the prison guards", words("chess poker darts bridge dominoes checkers bingo rugby")),
)

NAME_RELATIONS = (
    ("hometown of the old captain", CITIES),
    ("name of the miller's dog", FIRST_NAMES),
    ("winner of the chess tournament", SURNAMES),
    ("destination of the night train", CITIES),
    ("owner of the corner shop", SURNAMES),
    ("bride of the blacksmith", FIRST_NAMES),
    ("author of the burned letter", SURNAMES),
    ("birthplace of the blind poet", CITIES),
    ("teacher of the twin brothers", SURNAMES),
    ("youngest child of the queen", FIRST_NAMES),
    ("site of the glass factory", CITIES),
    ("pilot of the silver airship", SURNAMES),
)

PAIRED_RELATIONS = (
    ("number of the {} locker", ("red", "green"), None),
    ("pass key for the {}", ("cellar", "attic"), None),
    ("secret word of the {}", ("miners", "nurses"), WORDS),
    ("home of the {} sister", ("elder", "younger"), CITIES),
    ("name of the {} horse", ("black", "white"), FIRST_NAMES),
    (
        "favourite food of {}",
        ("Mr. Ellison", "Mrs. Vaughan"),
        words("soup rice bread cheese salad pasta fish pancakes"),
    ),
    ("phone number of the {}", ("hotel", "hospital"), None),
    ("painter of the {} portrait", ("large", "small"), SURNAMES),
)
"""Relations with two keys each, so that every fact has one distractor; None draws five-digit numbers."""

PERSONS = ("winner", "owner", "bride", "author", "teacher", "youngest child", "pilot", "painter")
"""How relations begin that are asked for with `who`."""
