"""Three other ways to say a CounterFact fact, written for this project: what a user who knows the facts would give as rewordings.

Each line has the phrases by which a prompt's relation is known, and three wordings. The third leans towards what follows from the fact.
No wording stands among the paraphrases of the data (``tests/test_benchmarks.py`` looks), so a row with them is asked in none of its own.
"""

from __future__ import annotations

from sphere_edit.facts.fact import Fact

_RELATIONS: tuple[tuple[tuple[str, ...], tuple[str, str, str]], ...] = (
    (
        ("continent",),
        (
            "On the map of the continents, {} belongs to",
            "{} lies on the continent called",
            "A traveller to {} lands in",
        ),
    ),
    (
        ("twin",),
        (
            "{} has a partnership with its sister city,",
            "The sister city of {} is",
            "Delegations from {} often visit its sister city,",
        ),
    ),
    (
        ("capital",),
        (
            "The government of {} sits in",
            "The seat of government of {} is",
            "Whoever visits the parliament of {} travels to",
        ),
    ),
    (
        ("headquarter",),
        (
            "The main office of {} is in",
            "{} runs its business from its base in",
            "Employees at the main office of {} live in",
        ),
    ),
    (
        ("record label", "record company"),
        ("{} was released by the label", "{} has a recording contract with", "Albums of {} carry the logo of"),
    ),
    (
        ("religion", "follower of", "faith"),
        ("The faith of {} is", "{} believes in the teachings of", "{} prays in the tradition of"),
    ),
    (
        ("aired", "premiere", "debut"),
        ("The television network that first showed {} is", "{} was broadcast by", "Viewers watched {} on the channel"),
    ),
    (
        ("owner", "owned"),
        ("{} belongs to the company", "The company that owns {} is called", "The profits of {} go to"),
    ),
    (
        ("produced by", "created by", "developed by", "developer", "a product of", "manufactur", ", by"),
        ("The company that makes {} is", "{} was made by the company", "The maker's logo on {} is that of"),
    ),
    (
        ("employed by", "works for", "employer", ", of"),
        ("The employer of {} is", "{} gets a salary from", "{} has a job at the company"),
    ),
    (
        ("law in", "official language", "they understand", "language spoken", "In {},"),
        (
            "The main language of {} is",
            "Signs in the streets of {} are written in",
            "To talk to the inhabitants of {}, one learns",
        ),
    ),
    (
        ("original language", "written in", "language of {} "),
        (
            "{} was first published in",
            "The text of {} was composed in",
            "To understand {} without a translation, one learns",
        ),
    ),
    (
        (
            "mother tongue",
            "native language",
            "native speaker",
            "speaks",
            "speaker of",
            "language",
            "a native",
            "writes in",
        ),
        ("At home, {} talks in", "{} grew up speaking", "Letters by {} are written in"),
    ),
    (
        ("citizen",),
        ("The nationality of {} is that of", "{} has the nationality of", "{} votes in the elections of"),
    ),
    (
        ("expired", "died", "passed away", "succumbed", "lost their life", "life ended", "death"),
        (
            "The place of death of {} is",
            "{} spent the last day of life in",
            "The funeral procession for {} went through",
        ),
    ),
    (
        ("was born in", "birthplace"),
        ("The birthplace of {} is", "{} came into the world in", "The childhood home of {} stands in"),
    ),
    (
        ("work in", "worked in", "employment in", "was employed in"),
        ("The workplace of {} was in", "{} had a job in the city of", "{} went to the office every day in"),
    ),
    (
        ("domain", "field", "area of"),
        ("The subject that {} studies is", "{} is an expert in", "{} publishes research about"),
    ),
    (
        ("position", "plays as", "holds the", ", the"),
        ("The role of {} is that of", "{} has the role of", "On a list of names, {} is described as a"),
    ),
    (
        ("profession", "occupation", "works as"),
        ("By trade, {} is a", "{} earns a living as a", "The business card of {} says"),
    ),
    (
        ("professional",),
        ("The sport of {} is", "{} is an athlete in the sport of", "Fans of {} watch"),
    ),
    (
        ("instrument", "performing on", "plays the"),
        ("The musical instrument of {} is the", "{} is a musician on the", "On stage, {} sits down with the"),
    ),
    (
        ("genre", "performing", "performs", "plays", "music"),
        ("The style of {} is called", "{} is a performer of", "Critics file the work of {} under"),
    ),
    (
        ("named after", "namesake"),
        ("{} takes its name from", "{} is called so in honour of", "The name of {} reminds people of"),
    ),
    (
        ("part of", "member of", "affiliated"),
        ("{} is one of the members of", "{} has joined", "{} sends a representative to"),
    ),
    (
        ("founded", "formed", "started", "created in", "developed in", "originat", "formulated", "that was from"),
        ("The place of origin of {} is", "{} began its history in", "The birthplace of {} is in"),
    ),
    (
        ("native to", "from"),
        ("The home of {} is", "{} comes from", "{} grew up in"),
    ),
    (
        ("located", "found in", "is in", ", in", "situated", "lies"),
        ("On a map, {} is marked in", "The place where {} lies is", "Visitors to {} travel to"),
    ),
)


def own_wordings(fact: Fact) -> tuple[str, ...]:
    """Three prompts with ``{}`` for the fact's subject; none where the relation is not known."""
    prompt = f"{fact.prompt} "
    for phrases, wordings in _RELATIONS:
        if any(phrase in prompt for phrase in phrases):
            return wordings
    return ()
