"""Lists of English words that tell kinds of answers apart."""

COLOUR_WORDS = """
amber aqua azure beige black blond blonde blue bronze brown burgundy charcoal cream crimson cyan gold golden gray grey
green indigo ivory khaki lavender lilac magenta maroon mauve navy ochre olive orange peach pink purple red rose salmon
scarlet silver tan teal turquoise violet white yellow
"""
SHADE_WORDS = "dark light bright pale deep"
CLOSED_WORDS = """
yes no true false left right up down top bottom middle center centre above below front behind north south east west
man woman men women boy girl male female increase decrease increasing decreasing increased decreased more less
monday tuesday wednesday thursday friday saturday sunday
"""
VERB_WORDS = """
is are was were has have had does did isn't aren't wasn't weren't hasn't haven't doesn't didn't it's he's she's that's
there's they're appears appear shows show indicates indicate contains contain represents depicts looks seems seem
suggests means holds wears stands sits lies hangs says reads belongs points faces consists features displays describes
provides includes refers remains becomes comes goes makes takes gives lives increases decreases
"""
CONTRACTED_WORDS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'm i've
isn't it'd it'll let's might've mightn't must've mustn't needn't oughtn't shan't should've shouldn't somebody'd
someone'd something'd that's there'd there're there's they'd they'll they're they've wasn't we've weren't what'll
what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've
wouldn't y'all you'd you'll you're you've
"""

COLOURS = frozenset(COLOUR_WORDS.split())
SHADES = frozenset(SHADE_WORDS.split())
CLOSED = frozenset(CLOSED_WORDS.split())
"""Words of which a similar one means something else: man and woman, increase and decrease."""
VERBS = frozenset(VERB_WORDS.split())
"""Finite verbs that sentences about pictures have."""
CONTRACTIONS = {word.replace("'", ""): word for word in CONTRACTED_WORDS.split()}
"""Contraction without its apostrophe -> with it."""
