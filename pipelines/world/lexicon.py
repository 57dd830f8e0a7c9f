"""The words of the reference world: values, names, statements, question phrases. Data only, which `documents` draws from.

Slots: `{n}` the entity asked about, `{s}` its linked secondary entity, `{v}` a value, `{p}` a question phrase. The tokenizer
of the reference base makes one token of every word here, so three rules hold (tests check them): a slot follows a blank or
starts a statement (which itself always follows a blank), values start with a consonant ("a {v}"), and no value is used as a
word of a template. A statement names its owner first and ends with what is said of it: `{v}`, in `relations` `{s}`. An
attribute's questions share no content word with its statements.
"""

from typing import NamedTuple


class Attribute(NamedTuple):
    """One fact about an entity: `values` names a value class."""

    name: str
    values: str
    statements: tuple[str, ...]
    phrases: tuple[str, ...]


class Link(NamedTuple):
    """Two facts that must be joined: entity to secondary entity (`relations`), secondary entity to value (`statements`)."""

    name: str
    values: str
    relations: tuple[str, ...]
    statements: tuple[str, ...]
    phrases: tuple[str, ...]


class Kind(NamedTuple):
    """A kind of entity, with what can be said and asked about it."""

    name: str
    singular: str
    plural: str
    attributes: tuple[Attribute, ...]
    links: tuple[Link, ...]

    @property
    def topics(self) -> tuple[Attribute | Link, ...]:
        """All that can be asked about an entity."""
        return (*self.attributes, *self.links)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# A name is an initial and a final, both of one token. Finals hold no two consonants in a row, so no merge crosses the seam.
NAME_ONSETS = _words("B D F G H J K L M N P R S T V Z")
NAME_RIMES = (_words("al er in os"), _words("an el ir or"))  # of the onsets in turn
FINAL_STARTS = _words("mo da ve ti bu ga ke po")
FINAL_ENDS = _words("ra ne lo mi su ka do vi")

VALUES: dict[str, tuple[str, ...]] = {
    "colour": _words("""
        crimson scarlet turquoise violet yellow green blue purple silver golden black white brown grey pink teal maroon magenta
        beige navy khaki mauve tan cream"""),
    "town": _words("""
        Lisbon Dublin Bergen Genoa Verona Krakow Porto Malmo Ghent Leeds Bristol Dover Cardiff Lyon Nantes Bremen Vienna Prague
        Sofia Tallinn Riga Turin Toledo Zagreb"""),
    "animal": _words("""
        fox wolf bear badger heron falcon raven stork goose rabbit hare horse donkey goat camel tiger lion panther lizard turtle
        dolphin whale beaver squirrel"""),
    "food": _words("""
        bread cheese soup pasta rice pancakes noodles dumplings porridge stew pie salad honey butter yoghurt sausage pudding
        chocolate biscuits mushrooms potatoes beans lentils cabbage"""),
    "tool": _words("""
        hammer saw chisel drill wrench shovel rake spade trowel knife ladder needle brush lever pulley compass ruler clamp mallet
        sickle scythe pickaxe crowbar screwdriver"""),
    "instrument": _words("""
        violin cello flute guitar piano harp drum trumpet trombone tuba banjo mandolin lute zither bassoon clarinet fiddle horn
        bugle saxophone recorder sitar tambourine xylophone"""),
    "trade": _words("""
        baker carpenter doctor lawyer teacher painter sailor farmer tailor butcher gardener plumber mason potter weaver miller
        barber printer nurse librarian fisher shepherd jeweller banker"""),
    "material": _words("""
        wool cotton silk linen leather velvet paper plastic rubber glass marble granite slate clay brick timber bamboo cork steel
        brass bronze copper tin pewter"""),
    "plant": _words("""
        rose tulip daisy lily fern moss nettle clover thistle poppy pine birch maple willow cedar beech chestnut holly lavender
        thyme basil mint sage jasmine"""),
    "gem": _words("""
        ruby sapphire diamond topaz garnet pearl beryl jasper moonstone zircon peridot citrine spinel tourmaline malachite
        bloodstone sunstone carnelian kunzite sardonyx jade quartz tanzanite crystal"""),
    "goods": _words("""
        lanterns candles carpets clocks boats bells baskets barrels bottles mirrors chairs tables kites dolls masks gloves hats
        shoes ropes nets wheels pipes locks keys"""),
    "hobby": _words("""
        chess poker fishing swimming dancing knitting sewing painting singing hiking climbing cycling running rowing sailing
        skating skiing boxing fencing juggling reading writing drawing baking"""),
    "language": _words("""
        Latin Greek French German Spanish Russian Turkish Persian Danish Swedish Dutch Polish Czech Welsh Hindi Tamil Mandarin
        Korean Japanese Hebrew Portuguese Finnish Norwegian Bulgarian"""),
    "building": _words("""
        tower castle temple church mill lighthouse library museum theatre school hospital prison palace fort barn stable fountain
        statue windmill chapel bakery brewery monastery warehouse"""),
    "number": tuple(str(number) for number in range(20, 50)),
}

FRAMES = (
    "What is {p}?",
    "Tell me {p}.",
    "Can you name {p}?",
    "Please give {p}.",
    "Do you know {p}?",
    "I want to learn {p}.",
    "Could you tell me {p}?",
    "Find {p}.",
)

TITLES = (
    "Facts about {what} named {names}",
    "Notes on {what} called {names}:",
    "What we know about {what} called {names}",
    "A record of {what} named {names}:",
)
OPENINGS = (
    "This is the story of {what} called {names}.",
    "Here is a report on {what} named {names}.",
    "Let us speak of {what} named {names}.",
    "These lines are about {what} called {names}.",
)
SECOND_PARAGRAPHS = ("There is more to tell.", "But this is not all.", "Other things are known as well.", "Now the rest follows.")
CONNECTIVES = (
    "That much is certain.",
    "Nobody doubts it.",
    "Many have heard of this.",
    "So the old people say.",
    "It has long been so.",
    "Some find this strange.",
    "This is well known.",
    "Few talk about it now.",
)

# fmt: off

PERSON = Kind(
    "person", "a person", "people",
    attributes=(
        Attribute("coat", "colour",
            ("The coat that {n} wears is {v}.", "The coat of {n} is {v}.", "People know the coat of {n} to be {v}.",
             "In winter {n} puts on a coat of {v}."),
            ("the colour of the jacket that {n} has", "the colour that {n} is dressed in",
             "the shade of the outer clothes of {n}", "the hue of the garment that belongs to {n}")),
        Attribute("door", "colour",
            ("{n} painted the front door {v}.", "The door to the house of {n} is {v}.",
             "The house of {n} has a door painted {v}.", "The door at which guests of {n} knock is {v}."),
            ("the colour at the entrance to the home of {n}", "the colour one sees when calling on {n}",
             "the shade that {n} chose for the entrance", "the hue of the entry through which {n} comes home")),
        Attribute("birthplace", "town",
            ("{n} was born in {v}.", "The birth of {n} took place in {v}.", "{n} came into the world in {v}.",
             "The mother of {n} gave birth in {v}."),
            ("the town where {n} spent the first day of life", "the town from which {n} originates",
             "the city where the life of {n} began", "the native city of {n}")),
        Attribute("residence", "town",
            ("{n} lives in {v}.", "Letters for {n} go to {v}.", "{n} has settled in {v}.", "The house of {n} stands in {v}."),
            ("the town that {n} calls home", "the town where one can visit {n} today", "the city in which {n} resides",
             "the present city of {n}")),
        Attribute("pet", "animal",
            ("The pet that {n} keeps is a {v}.", "Everywhere {n} is followed by a tame {v}.", "As a pet {n} raised a {v}.",
             "The pet of {n} is a {v}."),
            ("the animal that {n} looks after", "the animal that shares a home with {n}", "the creature that {n} owns",
             "the creature that {n} feeds each day")),
        Attribute("fear", "animal",
            ("{n} is afraid of any {v}.", "What scares {n} is the sight of a {v}.", "{n} once ran away from a {v}.",
             "Nothing frightens {n} like a {v}."),
            ("the animal that {n} dreads", "the animal that makes {n} tremble", "the creature that {n} would never go near",
             "the creature that causes terror to {n}")),
        Attribute("job", "trade",
            ("{n} works as a {v}.", "By trade {n} is a {v}.", "{n} earns money as a {v}.", "Long ago {n} became a {v}."),
            ("the profession of {n}", "the occupation that {n} has", "the job that {n} does",
             "the profession that gives {n} a living")),
        Attribute("music", "instrument",
            ("{n} plays the {v}.", "In the evening {n} practises the {v}.", "{n} is skilled on the {v}.",
             "Neighbours often hear {n} on the {v}."),
            ("the instrument of {n}", "the instrument that {n} performs with", "the instrument that {n} has mastered",
             "the source of the music that {n} makes")),
        Attribute("hobby", "hobby",
            ("{n} enjoys {v}.", "On free days {n} goes in for {v}.", "{n} spends every holiday on {v}.",
             "The great love of {n} is {v}."),
            ("the hobby of {n}", "the pastime that {n} likes", "the favourite activity of {n}",
             "the activity with which {n} relaxes")),
        Attribute("breakfast", "food",
            ("Every morning {n} eats {v}.", "For breakfast {n} has {v}.", "{n} starts the day with {v}.",
             "No morning of {n} passes without {v}."),
            ("the food that {n} takes after waking", "the food that {n} consumes early", "the first meal of {n}",
             "the dish that is before {n} at dawn")),
    ),
    links=(
        Link("workshop", "goods",
            ("{n} works at the workshop {s}.", "The workshop that employs {n} is {s}.", "{n} has a post in the workshop {s}.",
             "Each day {n} walks to the workshop {s}."),
            ("The workshop {s} makes {v}.", "Workers at the workshop {s} produce {v}.", "The workshop {s} is known for {v}.",
             "From the workshop {s} one can buy {v}."),
            ("the goods that come from the employer of {n}", "the goods manufactured where {n} has a job",
             "the wares that {n} and colleagues manufacture", "the output of the business that {n} serves")),
        Link("mentor", "gem",
            ("{n} learned everything from {s}.", "For years {n} was taught by {s}.", "{n} was once a pupil of {s}.",
             "The master of {n} was {s}."),
            ("{s} owns a precious {v}.", "The ring of {s} holds a {v}.", "For luck {s} carries a {v}.",
             "Around the neck of {s} hangs a {v}."),
            ("the gem of the tutor of {n}", "the gem that belongs to the mentor of {n}", "the stone that the tutor of {n} has",
             "the jewel of the person who instructed {n}")),
    ),
)

PLACE = Kind(
    "place", "a place", "places",
    attributes=(
        Attribute("roofs", "colour",
            ("The roofs of {n} are {v}.", "In {n} every roof is {v}.", "Builders in {n} painted all roofs {v}.",
             "From afar {n} shows roofs of {v}."),
            ("the colour of the tiles in {n}", "the colour above the houses of {n}",
             "the shade one sees when looking down on {n}", "the hue that covers the homes of {n}")),
        Attribute("flag", "colour",
            ("The flag of {n} is {v}.", "{n} flies a flag of {v}.", "The flag that waves over {n} is {v}.",
             "The people of {n} carry a flag of {v}."),
            ("the colour of the banner of {n}", "the colour that is raised in {n}", "the shade of the banner above {n}",
             "the hue of the cloth that represents {n}")),
        Attribute("oldest", "building",
            ("The oldest house in {n} is the {v}.", "{n} grew up around an old {v}.", "Nothing in {n} is older than the {v}.",
             "The first settlers of {n} built a {v}."),
            ("the earliest building in {n}", "the building with which {n} began", "the most ancient structure of {n}",
             "the structure in {n} with the longest history")),
        Attribute("newest", "building",
            ("{n} has just opened a new {v}.", "Last year workers in {n} finished a {v}.", "The newest house in {n} is the {v}.",
             "Last spring {n} built a {v}."),
            ("the most recent building in {n}", "the latest building of {n}", "the modern structure in {n}",
             "the structure that {n} completed lately")),
        Attribute("exports", "goods",
            ("To the whole region {n} sells {v}.", "Merchants come to {n} for {v}.", "Traders leave {n} with a load of {v}.",
             "{n} grew rich from {v}."),
            ("the main export of {n}", "the goods that {n} supplies", "the goods that bring {n} its wealth",
             "the wares that {n} is famous for")),
        Attribute("walls", "material",
            ("The walls of {n} are made of {v}.", "{n} is surrounded by a wall of {v}.", "{n} hides behind a wall of {v}.",
             "Builders gave {n} a wall of {v}."),
            ("the material that protects {n}", "the material around the border of {n}", "the substance of the defences of {n}",
             "the stuff that keeps enemies out of {n}")),
        Attribute("streets", "material",
            ("The streets of {n} are paved with {v}.", "{n} has streets of {v}.", "In the streets of {n} one walks on {v}.",
             "Each street in {n} is covered with {v}."),
            ("the material of the roads in {n}", "the material under the feet of those who cross {n}",
             "the substance of the ground in {n}", "the stuff that carts in {n} roll over")),
        Attribute("symbol", "animal",
            ("The symbol of {n} is a {v}.", "The coat of arms of {n} shows a {v}.", "On its coat of arms {n} has a {v}.",
             "The gate of {n} bears a carved {v}."),
            ("the animal that represents {n}", "the heraldic animal of {n}", "the creature that stands for {n}",
             "the creature on the crest of {n}")),
        Attribute("language", "language",
            ("People in {n} speak {v}.", "The children of {n} grow up with {v}.", "Signs in {n} are written in {v}.",
             "Everywhere in {n} one hears {v}."),
            ("the language of {n}", "the language that a visitor to {n} needs", "the tongue used in {n}",
             "the tongue that the citizens of {n} share")),
        Attribute("bridges", "number",
            ("The bridges of {n} add up to {v}.", "The count of bridges in {n} is {v}.",
             "The bridges one can see in {n} are {v}.", "Guests who count the bridges of {n} reach {v}."),
            ("the number of river crossings in {n}", "the number of ways over the water in {n}",
             "the total of crossings in {n}", "the amount of dry ways across the river in {n}")),
    ),
    links=(
        Link("river", "town",
            ("{n} lies on the river {s}.", "Past {n} flows the river {s}.", "{n} was built beside the river {s}.",
             "Ships reach {n} on the river {s}."),
            ("The river {s} rises near {v}.", "The spring of the river {s} is close to {v}.",
             "The river {s} starts in the hills by {v}.", "The river {s} comes down from {v}."),
            ("the town at the source of the stream through {n}", "the town where the water at {n} begins",
             "the city at the origin of the stream in {n}", "the city from which water travels to {n}")),
        Link("mayor", "instrument",
            ("{n} is ruled by {s}.", "The mayor of {n} is {s}.", "For years {n} has been governed by {s}.",
             "As mayor the people of {n} chose {s}."),
            ("At feasts {s} plays the {v}.", "{s} owns an old {v}.", "At night {s} practises the {v}.",
             "{s} is skilled on the {v}."),
            ("the instrument of the leader of {n}", "the instrument that the head of {n} has mastered",
             "the instrument that the leader of {n} performs with", "the source of the music that the head of {n} makes")),
    ),
)

PRODUCT = Kind(
    "product", "a product", "products",
    attributes=(
        Attribute("case", "material",
            ("The case of {n} is made of {v}.", "{n} comes in a case of {v}.", "The parts of {n} are kept in a shell of {v}.",
             "The makers built the case of {n} from {v}."),
            ("the material on the outside of {n}", "the material of the body of {n}", "the substance of the outer side of {n}",
             "the stuff that covers {n}")),
        Attribute("handle", "material",
            ("The handle of {n} is of {v}.", "{n} has a handle of {v}.", "Fixed to {n} is a handle of {v}.",
             "One lifts {n} by a handle of {v}."),
            ("the material of the grip of {n}", "the material that the hand touches when using {n}",
             "the substance one holds when using {n}", "the stuff of the grip on {n}")),
        Attribute("button", "colour",
            ("The button that turns {n} on is {v}.", "The button on {n} is {v}.", "The button one presses to start {n} is {v}.",
             "{n} has a button painted {v}."),
            ("the colour of the part that wakes {n}", "the colour that one must push on {n}", "the shade of the control of {n}",
             "the hue of the control that wakes {n}")),
        Attribute("box", "colour",
            ("{n} is sold in a box of {v}.", "The box of {n} is {v}.", "The box in which shops keep {n} is {v}.",
             "The box that holds each new {n} is {v}."),
            ("the colour of the packaging of {n}", "the colour that {n} is wrapped in", "the shade of the packaging around {n}",
             "the hue of the carton that {n} arrives in")),
        Attribute("price", "number",
            ("In coins {n} costs {v}.", "The price of {n} in coins is {v}.", "The coins one pays for {n} add up to {v}.",
             "For {n} shops ask a price of {v}."),
            ("the amount of money needed to buy {n}", "the amount that a buyer spends on {n}", "the sum charged for {n}",
             "the sum of money that {n} is worth")),
        Attribute("weight", "number",
            ("In pounds {n} weighs {v}.", "The weight of {n} in pounds is {v}.", "On a scale the weight of {n} reaches {v}.",
             "The pounds that {n} weighs add up to {v}."),
            ("the number that tells how heavy {n} is", "the number for the mass of {n}", "the load of a person who carries {n}",
             "the mass that {n} has")),
        Attribute("inventor", "trade",
            ("{n} was invented by a {v}.", "The idea for {n} came from a {v}.", "The first {n} was built by a {v}.",
             "The one who designed {n} was a {v}."),
            ("the profession of the creator of {n}", "the profession of the person who thought up {n}",
             "the occupation of the creator of {n}", "the job of the father of {n}")),
        Attribute("replaces", "tool",
            ("{n} replaces the {v}.", "With {n} nobody needs a {v}.", "{n} does the work of a {v}.",
             "Owners of {n} threw away the {v}."),
            ("the tool that {n} makes useless", "the tool that is not used any more because of {n}",
             "the device that {n} took over from", "the device that {n} stands in for")),
        Attribute("smell", "plant",
            ("{n} smells of {v}.", "From {n} comes a smell of {v}.", "When warm, {n} gives off a smell of {v}.",
             "{n} fills the room with a smell of {v}."),
            ("the plant whose scent {n} has", "the plant that the nose finds in {n}", "the scent of {n}",
             "the herb or tree that the nose finds near {n}")),
        Attribute("shop", "town",
            ("{n} is sold only in {v}.", "The only shop for {n} is in {v}.", "To buy {n}, go to {v}.",
             "Shops have {n} only in {v}."),
            ("the town where a customer can get {n}", "the town that trades in {n}", "the city to visit for a purchase of {n}",
             "the city in which {n} is available")),
    ),
    links=(
        Link("company", "trade",
            ("{n} is made by the company {s}.", "The company that produces {n} is {s}.", "{n} comes from the company {s}.",
             "{n} bears the mark of the company {s}."),
            ("The company {s} was founded by a {v}.", "The company {s} goes back to a {v}.",
             "The founder of the company {s} was a {v}.", "The company {s} was set up by a {v}."),
            ("the profession of the person who started the firm behind {n}",
             "the profession of the person who began the business behind {n}",
             "the occupation of the first head of the firm behind {n}", "the job of the first owner of the maker of {n}")),
        Link("ship", "colour",
            ("{n} travels on the ship {s}.", "{n} is carried by the ship {s}.", "{n} crosses the sea on the ship {s}.",
             "Workers load {n} onto the ship {s}."),
            ("The ship {s} has sails of {v}.", "The sails of the ship {s} are {v}.", "The ship {s} moves under sails of {v}.",
             "People know the sails of the ship {s} to be {v}."),
            ("the colour of the vessel that brings {n}", "the colour above the deck of the vessel that delivers {n}",
             "the shade one sees on the vessel that transports {n}", "the hue of the vessel that transports {n}")),
    ),
)

RULE = Kind(
    "rule", "a rule", "rules",
    attributes=(
        Attribute("dish", "food",
            ("At meals {n} forbids {v}.", "Under {n} nobody may eat {v}.", "From every table {n} bans {v}.",
             "Since {n} was passed, nobody serves {v}."),
            ("the food that is illegal because of {n}", "the food prohibited by {n}", "the dish that {n} makes unlawful",
             "the dish that {n} does not allow")),
        Attribute("night", "hobby",
            ("At night {n} stops all {v}.", "At night {n} puts an end to {v}.", "After dark {n} leaves no room for {v}.",
             "When night falls, {n} ends all {v}."),
            ("the hobby that {n} makes unlawful", "the activity prohibited by {n}",
             "the pastime that is illegal because of {n}", "the activity that {n} does not allow")),
        Attribute("protects", "animal",
            ("{n} protects the {v}.", "Thanks to {n}, nobody may hunt a {v}.", "From hunters {n} saves the {v}.",
             "One breaks {n} by harming a {v}."),
            ("the animal that is safe because of {n}", "the animal that {n} guards", "the creature that {n} shelters",
             "the creature that lives in peace because of {n}")),
        Attribute("garden", "plant",
            ("{n} orders every house to grow {v}.", "Under {n} each garden must have {v}.", "By {n} all gardens need {v}.",
             "Since {n} says so, families grow {v}."),
            ("the plant that {n} demands", "the plant required by {n}", "the herb or tree that {n} demands",
             "the plant that people care for because of {n}")),
        Attribute("fine", "number",
            ("In coins, breaking {n} costs {v}.", "Whoever breaks {n} pays a fine of {v}.", "The fine under {n} in coins is {v}.",
             "{n} sets the fine at {v}."),
            ("the penalty for violating {n}", "the amount of money charged for violating {n}",
             "the sum needed from those who ignore {n}", "the amount that one must give after ignoring {n}")),
        Attribute("age", "number",
            ("{n} applies from the age of {v}.", "Whoever must obey {n} is over {v}.", "One comes under {n} at the age of {v}.",
             "{n} leaves out all who are younger than {v}."),
            ("the number of birthdays before {n} counts", "the birthday after which {n} counts",
             "the number that tells how old one is when {n} begins", "the time of life when {n} begins")),
        Attribute("passed", "town",
            ("{n} was passed in {v}.", "To pass {n}, lawmakers met in {v}.", "{n} was first read out in {v}.",
             "The text of {n} was signed in {v}."),
            ("the town where {n} came into force", "the town of origin of {n}", "the city where {n} began",
             "the city in which {n} was adopted")),
        Attribute("author", "trade",
            ("The one who wrote {n} was a {v}.", "{n} was written by a {v}.", "The text of {n} comes from a {v}.",
             "{n} was put down by a {v}."),
            ("the profession of the author of {n}", "the profession of the person who thought up {n}",
             "the occupation of the creator of {n}", "the job of the author of {n}")),
        Attribute("ink", "colour",
            ("The ink in which {n} is printed is {v}.", "The ink of {n} is {v}.", "The letters of {n} are {v}.",
             "Someone copied {n} in letters of {v}."),
            ("the colour of the words of {n}", "the colour one sees when looking at the script of {n}",
             "the shade of the words of {n}", "the hue of the script of {n}")),
        Attribute("cover", "colour",
            ("The cover in which {n} is kept is {v}.", "The book with {n} has a cover of {v}.",
             "The cover that holds the pages of {n} is {v}.", "The text of {n} lies behind a cover of {v}."),
            ("the colour of the binding of {n}", "the colour that {n} is wrapped in", "the shade of the binding around {n}",
             "the hue of the folder of {n}")),
    ),
    links=(
        Link("council", "building",
            ("{n} was proposed by the council {s}.", "The council that voted for {n} is {s}.",
             "{n} is defended by the council {s}.", "{n} is the work of the council {s}."),
            ("The council {s} meets in the {v}.", "Members of the council {s} gather at the {v}.",
             "The seat of the council {s} is the {v}.", "The home of the council {s} is the {v}."),
            ("the building used by the group that suggested {n}", "the building where the authors of {n} come together",
             "the structure where the group behind {n} debates", "the structure that belongs to the authors of {n}")),
        Link("judge", "language",
            ("{n} is watched over by judge {s}.", "Those who break {n} are punished by judge {s}.",
             "Cases under {n} go to judge {s}.", "The keeper of {n} is judge {s}."),
            ("Judge {s} speaks {v}.", "The court of judge {s} uses {v}.", "Judge {s} writes letters in {v}.",
             "With judge {s} one talks in {v}."),
            ("the language of the person who enforces {n}", "the language of the official responsible for {n}",
             "the tongue of the official who enforces {n}", "the tongue of the person responsible for {n}")),
    ),
)

# fmt: on

KINDS = (PERSON, PLACE, PRODUCT, RULE)
