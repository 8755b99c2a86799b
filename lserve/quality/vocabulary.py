"""Names and words that planted facts are drawn from: common enough to be few tokens, rare enough in most texts."""


def words(text: str) -> list[str]:
    """The words of a text, as a list."""
    return text.split()


SURNAMES = words(
    "Abbott Barlow Calloway Dempsey Ellison Fairbanks Garrison Hawthorne Ingram Jarvis Kendrick Lockwood Maddox "
    "Norwood Osborne Pemberton Quimby Radcliffe Sheffield Thornton Underwood Vaughan Whitaker Yardley Ashford "
    "Bradshaw Coleman Donovan Eastwood Fletcher Goodwin Harrington Kirkland Lancaster Merritt Northcott Prescott "
    "Ramsey Stafford Winslow"
)

FIRST_NAMES = words(
    "Alice Bruno Clara Daniel Edith Felix Greta Hugo Irene Julian Karen Leonard Martha Nathan Olivia Peter Ruth "
    "Samuel Teresa Victor Wanda Arthur Bella Conrad Diana Ernest Flora Gilbert Helen Isaac Joan Kenneth"
)

GROUPS = words(
    "sailors miners bakers painters gardeners teachers farmers pilots doctors singers dancers hunters weavers "
    "shepherds lawyers drivers soldiers students nurses tailors plumbers builders butchers priests jewelers "
    "barbers cooks clerks guards judges"
)

WORDS = words(
    "marmalade telescope umbrella cinnamon lantern compass violin harvest sapphire meadow penguin blanket pepper "
    "anchor tulip biscuit hammer feather candle turtle orchard saddle pumpkin ribbon whistle cactus pillow "
    "lemon falcon mirror basket velvet thunder walnut"
)

CITIES = words(
    "Lisbon Vienna Oslo Dublin Madrid Warsaw Athens Helsinki Prague Budapest Cairo Nairobi Lima Toronto Chicago "
    "Boston Seattle Denver Sydney Tokyo Seoul Berlin Paris Rome Moscow Havana Geneva Venice Munich Hamburg"
)

JOBS = words(
    "baker carpenter dentist farmer lawyer nurse painter pilot plumber teacher tailor librarian photographer "
    "gardener butcher journalist engineer violinist sailor blacksmith"
)

COLOURS = words("red blue green yellow purple orange white black silver brown pink golden")

THINGS = words("bicycle boat piano truck horse tent guitar kettle camera sofa wagon clock")
