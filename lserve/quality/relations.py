"""Relations that planted facts are about, by what their values are: no two alike, so that none distracts from another.

A model of 135M parameters finds such facts in 7,500 tokens of real text where the relation says what kind of thing the
value is (`the favourite fruit of Mrs. Palmer`); to others it answers out of its head, dense or not, so that relations
are left out of which its dense attention found less than half (the price of a watch: never; a nickname: a third), and
pairs below 45 %. And among ten of one relation (`the pass key for Vienna`, `for Oslo`, ...) it takes one for another.
Larger models do neither.
"""

from .vocabulary import CITIES, SURNAMES, words

NUMBER_RELATIONS = (
    "phone number of Mr. Lighthouse",
    "number of the lost ticket",
    "population of the valley",
    "serial number of the old tractor",
    "pass key for the north gate",
    "salary of Mrs. Bennett",
    "postal code of the fishing village",
    "distance to the moon base",
    "telephone extension of Dr. Moreau",
    "licence number of Captain Silver",
    "student number of Miss Chang",
)

WORD_RELATIONS = (
    ("favourite fruit of Mrs. Palmer", words("mango banana cherry apricot coconut peach plum melon")),
    ("profession of Mr. Winterbottom", words("carpenter dentist lawyer plumber tailor butcher farmer nurse")),
    ("colour of the mayor's coat", words("purple orange yellow pink white")),
    ("favourite sport of Miss Holloway", words("tennis hockey golf rowing cricket rugby boxing skiing")),
    ("favourite drink of Mr. Baxter", words("lemonade cider brandy cocoa coffee milk wine beer")),
    ("favourite instrument of Miss Tanaka", words("violin trumpet harp flute guitar cello piano drum")),
    ("favourite season of Miss Lindgren", words("autumn winter spring summer")),
    ("hobby of Mrs. Kowalski", words("fishing knitting painting gardening sailing dancing cooking reading")),
    ("favourite colour of Mrs. Whitlock", words("silver brown green red blue black golden")),
    ("allergy of Mr. Sandoval", words("peanuts shellfish wheat pollen eggs soy cats dust")),
)

NAME_RELATIONS = (
    ("hometown of the old captain", words("Lisbon Oslo Dublin Warsaw Lima Seoul Madrid Boston")),
    ("birthplace of Mr. Delaney", words("Vienna Athens Prague Cairo Toronto Sydney Berlin Denver")),
    ("native language of Mrs. Okafor", words("Swahili Dutch Polish Finnish Korean Turkish Greek Danish")),
    ("favourite city of Mrs. Romero", words("Geneva Munich Havana Chicago Venice Rome Paris Tokyo")),
    ("employer of Mr. Hutchinson", words("Bluebird Northwind Starlight Redwood Ironside Goldleaf")),
    ("religion of Mr. Abernathy", words("Buddhism Islam Judaism Hinduism Christianity Taoism")),
    ("name of the captain's ship", words("Albatross Discovery Victory Phoenix Mermaid Neptune Pegasus")),
    ("birthday month of Mr. Osgood", words("March June October April August November")),
    ("winner of the chess tournament", words("Merritt Norwood Ramsey Stafford Winslow Prescott Barlow")),
    ("destination of the night train", words("Hamburg Budapest Helsinki Moscow Seattle Nairobi")),
)

PAIRED_RELATIONS = (
    ("phone number of the {}", ("hotel", "hospital"), None),
    ("pass key for the {}", ("cellar", "attic"), None),
    ("home of the {} sister", ("elder", "younger"), CITIES),
    (
        "favourite food of {}",
        ("Mr. Ellison", "Mrs. Vaughan"),
        words("soup rice bread cheese salad pasta fish pancakes"),
    ),
    ("painter of the {} portrait", ("large", "small"), SURNAMES),
)
"""Relations with two keys each, so that every fact has one distractor; None draws five-digit numbers."""

PERSONS = ("winner", "painter")
"""How relations begin that are asked for with `who`."""
