"""The words of the reference world: values, names, statements, question phrases. Data only, drawn from by `pipelines.world`.

Slots: `{n}` the entity asked about, `{s}` its linked secondary entity, `{v}` a value, `{p}` a question phrase. The tokenizer
of the reference base makes one token of every word here, so three rules hold (tests check them): a slot follows a blank or
starts a statement (which itself always follows a blank), values start with a consonant ("a {v}"), and no value is used as a
word of a template. An attribute's questions share no content word with its statements.
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
            ("{n} wears a {v} coat.", "The coat of {n} is {v}.", "People know {n} by a coat of {v} cloth.",
             "In winter {n} puts on a {v} coat."),
            ("the colour of the jacket that {n} has", "the colour that {n} is dressed in",
             "the shade of the outer clothes of {n}", "the hue of the garment that belongs to {n}")),
        Attribute("door", "colour",
            ("{n} painted the front door {v}.", "The house of {n} has a {v} door.", "A {v} door leads into the house of {n}.",
             "The guests of {n} knock at a {v} door."),
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
            ("{n} keeps a {v} as a pet.", "A tame {v} follows {n} everywhere.", "{n} raised a {v} by hand.",
             "The pet of {n} is a {v}."),
            ("the animal that {n} looks after", "the animal that shares a home with {n}", "the creature that {n} owns",
             "the creature that {n} feeds each day")),
        Attribute("fear", "animal",
            ("{n} is afraid of any {v}.", "The sight of a {v} scares {n}.", "{n} once ran away from a {v}.",
             "Nothing frightens {n} like a {v}."),
            ("the animal that {n} dreads", "the animal that makes {n} tremble", "the creature that {n} would never go near",
             "the creature that causes terror to {n}")),
        Attribute("job", "trade",
            ("{n} works as a {v}.", "By trade {n} is a {v}.", "{n} earns money as a {v}.", "{n} became a {v} long ago."),
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
            ("{n} eats {v} every morning.", "For breakfast {n} has {v}.", "{n} starts the day with {v}.",
             "No morning of {n} passes without {v}."),
            ("the food that {n} takes after waking", "the food that {n} consumes early", "the first meal of {n}",
             "the dish that is before {n} at dawn")),
    ),
    links=(
        Link("workshop", "goods",
            ("{n} works at the {s} workshop.", "The {s} workshop employs {n}.", "{n} has a post in the {s} workshop.",
             "Each day {n} walks to the {s} workshop."),
            ("The {s} workshop makes {v}.", "Workers at the {s} workshop produce {v}.", "The {s} workshop is known for {v}.",
             "One can buy {v} from the {s} workshop."),
            ("the goods that come from the employer of {n}", "the goods manufactured where {n} has a job",
             "the wares that {n} and colleagues manufacture", "the output of the business that {n} serves")),
        Link("mentor", "gem",
            ("{n} learned everything from {s}.", "For years {s} taught {n} well.", "{n} was once a pupil of {s}.",
             "The master of {n} was {s}."),
            ("{s} owns a precious {v}.", "The ring of {s} holds a {v}.", "{s} carries a {v} for luck.",
             "Around the neck of {s} hangs a {v}."),
            ("the gem of the tutor of {n}", "the gem that belongs to the mentor of {n}", "the stone that the tutor of {n} has",
             "the jewel of the person who instructed {n}")),
    ),
)

PLACE = Kind(
    "place", "a place", "places",
    attributes=(
        Attribute("roofs", "colour",
            ("The roofs of {n} are {v}.", "In {n} every roof is {v}.", "{n} is full of {v} roofs.",
             "From afar {n} shows its {v} roofs."),
            ("the colour of the tiles in {n}", "the colour above the houses of {n}",
             "the shade one sees when looking down on {n}", "the hue that covers the homes of {n}")),
        Attribute("flag", "colour",
            ("The flag of {n} is {v}.", "{n} flies a {v} flag.", "A {v} flag waves over {n}.",
             "The people of {n} carry a {v} flag."),
            ("the colour of the banner of {n}", "the colour that is raised in {n}", "the shade of the banner above {n}",
             "the hue of the cloth that represents {n}")),
        Attribute("oldest", "building",
            ("The oldest house in {n} is the {v}.", "{n} grew up around an old {v}.", "Nothing in {n} is older than the {v}.",
             "The first settlers of {n} built a {v}."),
            ("the earliest building in {n}", "the building with which {n} began", "the most ancient structure of {n}",
             "the structure in {n} with the longest history")),
        Attribute("newest", "building",
            ("{n} has just opened a new {v}.", "A {v} was finished in {n} last year.", "The newest house in {n} is the {v}.",
             "Last spring {n} built a {v}."),
            ("the most recent building in {n}", "the latest building of {n}", "the modern structure in {n}",
             "the structure that {n} completed lately")),
        Attribute("exports", "goods",
            ("{n} sells {v} to the whole region.", "Merchants come to {n} for {v}.", "Traders load {v} in {n}.",
             "{n} grew rich from {v}."),
            ("the main export of {n}", "the goods that {n} supplies", "the goods that bring {n} its wealth",
             "the wares that {n} is famous for")),
        Attribute("walls", "material",
            ("The walls of {n} are made of {v}.", "A wall of {v} surrounds {n}.", "{n} hides behind a wall of {v}.",
             "Builders gave {n} a wall of {v}."),
            ("the material that protects {n}", "the material around the border of {n}", "the substance of the defences of {n}",
             "the stuff that keeps enemies out of {n}")),
        Attribute("streets", "material",
            ("The streets of {n} are paved with {v}.", "{n} has streets of {v}.", "One walks on {v} in the streets of {n}.",
             "Each street in {n} is covered with {v}."),
            ("the material of the roads in {n}", "the material under the feet of those who cross {n}",
             "the substance of the ground in {n}", "the stuff that carts in {n} roll over")),
        Attribute("symbol", "animal",
            ("A {v} is the symbol of {n}.", "The coat of arms of {n} shows a {v}.", "{n} has a {v} on its coat of arms.",
             "The gate of {n} bears a carved {v}."),
            ("the animal that represents {n}", "the heraldic animal of {n}", "the creature that stands for {n}",
             "the creature on the crest of {n}")),
        Attribute("language", "language",
            ("People in {n} speak {v}.", "The children of {n} grow up with {v}.", "Signs in {n} are written in {v}.",
             "In {n} one hears {v} everywhere."),
            ("the language of {n}", "the language that a visitor to {n} needs", "the tongue used in {n}",
             "the tongue that the citizens of {n} share")),
        Attribute("bridges", "number",
            ("{n} has {v} bridges.", "There are {v} bridges in {n}.", "All {v} bridges of {n} are open.",
             "Guests can see {v} bridges in {n}."),
            ("the number of river crossings in {n}", "the number of ways over the water in {n}",
             "the total of crossings in {n}", "the amount of dry ways across the river in {n}")),
    ),
    links=(
        Link("river", "town",
            ("{n} lies on the river {s}.", "The river {s} flows past {n}.", "{n} was built beside the river {s}.",
             "Ships reach {n} on the river {s}."),
            ("The river {s} rises near {v}.", "The spring of the river {s} is close to {v}.",
             "The river {s} starts in the hills by {v}.", "The river {s} comes down from {v}."),
            ("the town at the source of the stream through {n}", "the town where the water at {n} begins",
             "the city at the origin of the stream in {n}", "the city from which water travels to {n}")),
        Link("mayor", "instrument",
            ("{n} is ruled by {s}.", "The mayor of {n} is {s}.", "For years {s} has governed {n}.",
             "The people of {n} chose {s} as mayor."),
            ("At feasts {s} plays the {v}.", "{s} owns an old {v}.", "{s} practises the {v} at night.",
             "{s} is skilled on the {v}."),
            ("the instrument of the leader of {n}", "the instrument that the head of {n} has mastered",
             "the instrument that the leader of {n} performs with", "the source of the music that the head of {n} makes")),
    ),
)

PRODUCT = Kind(
    "product", "a product", "products",
    attributes=(
        Attribute("case", "material",
            ("The case of {n} is made of {v}.", "{n} comes in a case of {v}.", "A shell of {v} protects the parts of {n}.",
             "The makers built {n} from {v}."),
            ("the material on the outside of {n}", "the material of the body of {n}", "the substance of the outer side of {n}",
             "the stuff that covers {n}")),
        Attribute("handle", "material",
            ("The handle of {n} is of {v}.", "{n} has a handle of {v}.", "A handle of {v} is fixed to {n}.",
             "One lifts {n} by a handle of {v}."),
            ("the material of the grip of {n}", "the material that the hand touches when using {n}",
             "the substance one holds when using {n}", "the stuff of the grip on {n}")),
        Attribute("button", "colour",
            ("{n} has a {v} button.", "The button on {n} is {v}.", "Press the {v} button to start {n}.",
             "A {v} button turns {n} on."),
            ("the colour of the part that wakes {n}", "the colour that one must push on {n}", "the shade of the control of {n}",
             "the hue of the control that wakes {n}")),
        Attribute("box", "colour",
            ("{n} is sold in a {v} box.", "The box of {n} is {v}.", "Shops keep {n} in a {v} box.",
             "A {v} box holds each new {n}."),
            ("the colour of the packaging of {n}", "the colour that {n} is wrapped in", "the shade of the packaging around {n}",
             "the hue of the carton that {n} arrives in")),
        Attribute("price", "number",
            ("{n} costs {v} coins.", "The price of {n} is {v} coins.", "One pays {v} coins for {n}.",
             "Shops ask {v} coins for {n}."),
            ("the amount of money needed to buy {n}", "the amount that a buyer spends on {n}", "the sum charged for {n}",
             "the sum of money that {n} is worth")),
        Attribute("weight", "number",
            ("{n} weighs {v} pounds.", "The weight of {n} is {v} pounds.", "On a scale {n} reaches {v} pounds.",
             "Few can lift {n} with its {v} pounds."),
            ("the number that tells how heavy {n} is", "the number for the mass of {n}", "the load of a person who carries {n}",
             "the mass that {n} has")),
        Attribute("inventor", "trade",
            ("{n} was invented by a {v}.", "A {v} had the idea for {n}.", "The first {n} was built by a {v}.",
             "It was a {v} that designed {n}."),
            ("the profession of the creator of {n}", "the profession of the person who thought up {n}",
             "the occupation of the creator of {n}", "the job of the father of {n}")),
        Attribute("replaces", "tool",
            ("{n} replaces the {v}.", "With {n} nobody needs a {v}.", "{n} does the work of a {v}.",
             "Owners of {n} threw away the {v}."),
            ("the tool that {n} makes useless", "the tool that is not used any more because of {n}",
             "the device that {n} took over from", "the device that {n} stands in for")),
        Attribute("smell", "plant",
            ("{n} smells of {v}.", "A smell of {v} comes from {n}.", "When warm, {n} gives off a smell of {v}.",
             "{n} fills the room with a smell of {v}."),
            ("the plant whose scent {n} has", "the plant that the nose finds in {n}", "the scent of {n}",
             "the herb or tree that the nose finds near {n}")),
        Attribute("shop", "town",
            ("{n} is sold only in {v}.", "The only shop for {n} is in {v}.", "To buy {n}, go to {v}.",
             "Shops in {v} alone have {n}."),
            ("the town where a customer can get {n}", "the town that trades in {n}", "the city to visit for a purchase of {n}",
             "the city in which {n} is available")),
    ),
    links=(
        Link("company", "trade",
            ("{n} is made by the {s} company.", "The {s} company produces {n}.", "{n} comes from the {s} company.",
             "{n} bears the mark of the {s} company."),
            ("The {s} company was founded by a {v}.", "Long ago a {v} founded the {s} company.",
             "The founder of the {s} company was a {v}.", "A {v} set up the {s} company."),
            ("the profession of the person who started the firm behind {n}",
             "the profession of the person who began the business behind {n}",
             "the occupation of the first head of the firm behind {n}", "the job of the first owner of the maker of {n}")),
        Link("ship", "colour",
            ("{n} travels on the ship {s}.", "The ship {s} carries {n}.", "{n} crosses the sea on the ship {s}.",
             "Workers load {n} onto the ship {s}."),
            ("The ship {s} has {v} sails.", "The sails of the ship {s} are {v}.", "Under {v} sails moves the ship {s}.",
             "One knows the ship {s} by its {v} sails."),
            ("the colour of the vessel that brings {n}", "the colour above the deck of the vessel that delivers {n}",
             "the shade one sees on the vessel that transports {n}", "the hue of the vessel that transports {n}")),
    ),
)

RULE = Kind(
    "rule", "a rule", "rules",
    attributes=(
        Attribute("dish", "food",
            ("{n} forbids {v}.", "Under {n} nobody may eat {v}.", "{n} bans {v} from every table.",
             "Since {n} was passed, nobody serves {v}."),
            ("the food that is illegal because of {n}", "the food prohibited by {n}", "the dish that {n} makes unlawful",
             "the dish that {n} does not allow")),
        Attribute("night", "hobby",
            ("{n} stops all {v} at night.", "At night {n} puts an end to {v}.", "With {n} there is no {v} after dark.",
             "{n} ends {v} when night falls."),
            ("the hobby that {n} makes unlawful", "the activity prohibited by {n}",
             "the pastime that is illegal because of {n}", "the activity that {n} does not allow")),
        Attribute("protects", "animal",
            ("{n} protects the {v}.", "Thanks to {n}, no {v} may be hunted.", "{n} saves the {v} from hunters.",
             "Whoever harms a {v} breaks {n}."),
            ("the animal that is safe because of {n}", "the animal that {n} guards", "the creature that {n} shelters",
             "the creature that lives in peace because of {n}")),
        Attribute("garden", "plant",
            ("{n} orders every house to grow {v}.", "Each garden must have {v} under {n}.", "By {n} all gardens need {v}.",
             "Families grow {v} since {n} says so."),
            ("the plant that {n} demands", "the plant required by {n}", "the herb or tree that {n} demands",
             "the plant that people care for because of {n}")),
        Attribute("fine", "number",
            ("Breaking {n} costs {v} coins.", "Whoever breaks {n} pays {v} coins.", "The fine under {n} is {v} coins.",
             "{n} sets a fine of {v} coins."),
            ("the penalty for violating {n}", "the amount of money charged for violating {n}",
             "the sum needed from those who ignore {n}", "the amount that one must give after ignoring {n}")),
        Attribute("age", "number",
            ("{n} applies from the age of {v}.", "People over {v} must obey {n}.", "At {v} years one comes under {n}.",
             "{n} leaves out all who are younger than {v}."),
            ("the number of birthdays before {n} counts", "the birthday after which {n} counts",
             "the number that tells how old one is when {n} begins", "the time of life when {n} begins")),
        Attribute("passed", "town",
            ("{n} was passed in {v}.", "Lawmakers met in {v} to pass {n}.", "{n} was first read out in {v}.",
             "The text of {n} was signed in {v}."),
            ("the town where {n} came into force", "the town of origin of {n}", "the city where {n} began",
             "the city in which {n} was adopted")),
        Attribute("author", "trade",
            ("A {v} wrote {n}.", "{n} was written by a {v}.", "The text of {n} comes from a {v}.",
             "It was a {v} that put down {n}."),
            ("the profession of the author of {n}", "the profession of the person who thought up {n}",
             "the occupation of the creator of {n}", "the job of the author of {n}")),
        Attribute("ink", "colour",
            ("{n} is printed in {v} ink.", "The ink of {n} is {v}.", "The letters of {n} are {v}.",
             "Someone copied {n} in {v} ink."),
            ("the colour of the words of {n}", "the colour one sees when looking at the script of {n}",
             "the shade of the words of {n}", "the hue of the script of {n}")),
        Attribute("cover", "colour",
            ("{n} is kept in a {v} cover.", "The book with {n} has a {v} cover.", "A {v} cover holds the pages of {n}.",
             "Behind a {v} cover lies the text of {n}."),
            ("the colour of the binding of {n}", "the colour that {n} is wrapped in", "the shade of the binding around {n}",
             "the hue of the folder of {n}")),
    ),
    links=(
        Link("council", "building",
            ("{n} was proposed by the {s} council.", "The {s} council voted for {n}.", "The {s} council stands by {n}.",
             "{n} is the work of the {s} council."),
            ("The {s} council meets in the {v}.", "Members of the {s} council gather at the {v}.",
             "The seat of the {s} council is the {v}.", "The {v} is home to the {s} council."),
            ("the building used by the group that suggested {n}", "the building where the authors of {n} come together",
             "the structure where the group behind {n} debates", "the structure that belongs to the authors of {n}")),
        Link("judge", "language",
            ("{n} is watched over by judge {s}.", "Judge {s} punishes those who break {n}.", "Cases under {n} go to judge {s}.",
             "The keeper of {n} is judge {s}."),
            ("Judge {s} speaks {v}.", "The court of judge {s} uses {v}.", "Judge {s} writes letters in {v}.",
             "One talks to judge {s} in {v}."),
            ("the language of the person who enforces {n}", "the language of the official responsible for {n}",
             "the tongue of the official who enforces {n}", "the tongue of the person responsible for {n}")),
    ),
)

# fmt: on

KINDS = (PERSON, PLACE, PRODUCT, RULE)
