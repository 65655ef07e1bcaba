"""Figures on the site (tools/book_site.py): what a notebook keeps as SVG stands in the page itself, in the colours of
its theme, as wide as the page, with no letter below LEAST pixels: a page too narrow for that scrolls the figure.

A notebook keeps its figures on white, and explorers keep theirs as addresses of <img>, for there they are seen without
scripts and style sheets. Black, white and greys of a figure become mixtures of the page's two colours. Other colours stay, as
the book's are told from either ground; what is written on a coloured ground stays as it was, too; what is written
elsewhere in a colour is mixed with that of the page's text. Figures of pixels keep their white ground.
"""

import base64, hashlib, json, math, re
import xml.etree.ElementTree as ElementTree
from html import escape, unescape
from urllib.parse import unquote

LEAST = 11  # pixels of a letter, on a telephone, too
USUAL = 12  # pixels of the smallest letters that nbs/matplotlibrc sets, as in legends: what a PNG is taken to have
PAGE, INK = "var(--bs-body-bg, Canvas)", "currentColor"
NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
NOTHING = [], {}  # the polygons and the style of a path that is not there
POINT = 96 / 72  # pixels of a page in the point that a figure is measured in

# ------------------------------------------------------------------------------------------------ what lies where


def style_of(element):
    "The style of an element as a dict."
    return dict(re.findall(r"([\w-]+): *([^;]+?) *(?:;|$)", element.get("style", "")))


def numbers(text):
    return [float(n) for n in re.findall(NUMBER, text or "")]


def corners(path):
    "Where the strokes of a path end, one list of points for each of its parts."
    parts = []
    for letter, told in re.findall(r"([MLCQZz])([^MLCQZz]*)", path or ""):
        if letter == "M":
            parts.append([])
        if at := numbers(told):
            parts[-1] += [tuple(at[-2:])]
    return parts


def is_inside(point, polygon):
    "Whether a point lies in a polygon: a ray from it crosses its edges an odd number of times."
    (x, y), inside = point, False
    for (x0, y0), (x1, y1) in zip(polygon, polygon[1:] + polygon[:1]):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            inside = not inside
    return inside


def letters(element):
    "The size of a text's letters in points; of a formula that of its largest, as its indices are smaller by right."
    told = [style_of(e).get("font", "") or style_of(e).get("font-size", "") for e in element.iter()]
    return max((float(n) for t in told for n in re.findall(r"([\d.]+)px", t)), default=10.0)


def middle(element, shift):
    "About where the middle of a text is."
    size, anchor = letters(element), style_of(element).get("text-anchor", "start")
    x, y = shift[0] + float(element.get("x", 0)), shift[1] + float(element.get("y", 0))
    said = sum(len(part.strip()) for part in element.itertext())  # parts of a formula stand on lines of their own
    along = 0.3 * size * said * {"start": 1, "middle": 0, "end": -1}[anchor]
    turned = re.search(rf"rotate\(({NUMBER})", element.get("transform", ""))
    angle = math.radians(float(turned[1])) if turned else 0
    up = -0.35 * size
    return (x + along * math.cos(angle) - up * math.sin(angle), y + along * math.sin(angle) + up * math.cos(angle))


def shapes(element, drawn):
    "The polygons that an element fills. `drawn`: paths that others refer to, by id, each with its style."
    if element.tag in ("image", "rect"):
        x, y, wide, high = (float(element.get(k, "0").removesuffix("px")) for k in ("x", "y", "width", "height"))
        flipped = re.search(rf"scale\(1 -1\) translate\(0 ({NUMBER})\)", element.get("transform", ""))
        y = -float(flipped[1]) - y - high if flipped else y
        return [[(x, y), (x + wide, y), (x + wide, y + high), (x, y + high)]]
    if element.tag == "use":
        x, y = float(element.get("x", 0)), float(element.get("y", 0))
        held, _ = drawn.get(element.get("href", "")[1:], NOTHING)
        return [[(x + a, y + b) for a, b in part] for part in held]
    return corners(element.get("d")) if element.tag == "path" else []


# ------------------------------------------------------------------------------------------------ colours


def is_colour(value):
    "Whether a colour is one, and no grey."
    parts = [int(value[i : i + 2], 16) for i in (1, 3, 5)] if re.fullmatch("#[0-9a-fA-F]{6}", value) else [0]
    return max(parts) - min(parts) > 12


def of_page(value, text=False):
    """A colour of matplotlib as one of the page, and how the page mixes it: ("var(--mz-30)", "color-mix(…)").
    `text`: what is written in it must be told from the ground."""
    if not re.fullmatch("#[0-9a-fA-F]{6}", value):
        return value, None
    if is_colour(value):
        return (f"var(--mz-{value[1:]})", f"color-mix(in srgb, {value} 50%, {INK})") if text else (value, None)
    dark = round(100 - int(value[1:3], 16) / 2.55)
    return (INK, None) if dark == 100 else (f"var(--mz-{dark})", f"color-mix(in srgb, {INK} {dark}%, {PAGE})")


def coloured(root):
    "Give every part of a figure its colour on the page; returned are the mixed ones by their names."
    mixed = {}

    def recoloured(element, told, text=False):
        for name in {"fill", "stroke"} & told.keys():
            told[name], how = of_page(told[name], text)
            if how:
                mixed[told[name][4:-1]] = how
        element.set("style", ";".join(f"{k}:{v}" for k, v in told.items()))

    drawn = {e.get("id"): (corners(e.get("d")), style_of(e)) for e in root.iter("path") if e.get("id")}
    clips = {f"url(#{e.get('id')})": shapes(e[0], {})[0] for e in root.iter("clipPath")}
    grounds = []  # polygons within others, each with how much of its colour one sees, which stays; the last one on top

    def visit(element, shift, defined, ink, clip):
        style = style_of(element)
        ink, clip = style.get("fill", ink), clips.get(element.get("clip-path"), clip)
        moved = re.match(rf"translate\(({NUMBER})[ ,]+({NUMBER})\)", element.get("transform", ""))
        if element.tag == "g" and moved:
            shift = shift[0] + float(moved[1]), shift[1] + float(moved[2])
        if element.tag == "text":
            at = middle(element, shift)
            under = (g for g in reversed(grounds) if is_inside(at, g[0]) and (g[1] is None or is_inside(at, g[1])))
            _, _, share = next(under, (None, None, 0))
            if share >= 0.5 or share and ink == "#ffffff":  # white is meant for a colour, a faint one, too
                element.set("fill", ink)
            else:
                for part in element.iter():
                    recoloured(part, style_of(part), text=True)
            return
        all_of_it = {**drawn.get(element.get("href", "")[1:], NOTHING)[1], **style}
        fill = all_of_it.get("fill", "#000000" if element.tag in ("path", "use") else "none")
        seen = float(all_of_it.get("fill-opacity", 1)) * float(all_of_it.get("opacity", 1))
        stays = element.tag == "image" or is_colour(fill)
        if not defined and (stays or fill != "none" and seen >= 0.5):
            grounds.extend((polygon, clip, seen * stays) for polygon in shapes(element, drawn))
        if style:
            recoloured(element, style, text=element.tag == "g")
        for inner in element:
            visit(inner, shift, defined or element.tag in ("defs", "clipPath"), ink, clip)

    visit(root, (0.0, 0.0), False, "#000000", None)
    return mixed


# ------------------------------------------------------------------------------------------------ elements


def plain(svg):
    "A figure as a tree without names of namespaces, as HTML has it, and without a style sheet, which were one of the page."
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        for inner in list(element):
            if inner.tag.rpartition("}")[2] in ("style", "metadata"):
                element.remove(inner)
    return root


def in_page(
    svg: str,  # a figure as matplotlib writes it, its texts as texts (`svg.fonttype: none`)
    alt: str,  # the text that stands for it
) -> str:  # an <svg> element
    "A figure as an element of the page."
    root = plain(svg)
    _, _, wide, high = numbers(root.get("viewBox"))
    mixed = coloured(root)
    mark = hashlib.sha256(svg.encode()).hexdigest()[:8]  # what several figures of a page call by one name
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name == "id":
                element.set(name, f"f{mark}{value}")
            elif name == "href":
                element.set(name, re.sub("^#", f"#f{mark}", value))
            elif "url(#" in value:
                element.set(name, value.replace("url(#", f"url(#f{mark}"))
    least = math.ceil(wide * LEAST / min(map(letters, root.iter("text")), default=LEAST))
    held = "".join(ElementTree.tostring(e, encoding="unicode") for e in root)
    shown = max(math.ceil(wide * POINT), least)
    return (
        f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {wide:g} {high:g}" width="{shown}"'
        f' height="{math.ceil(shown * high / wide)}" fill="{INK}" stroke-linejoin="round"'
        f' style="{";".join(f"{k}:{v}" for k, v in {"--least": f"{least}px", **mixed}.items())}">{held}</svg>'
    )


def pixels(held, alt):
    "A PNG as an element with its size, so that the page does not move when it comes."
    head = base64.b64decode(held[:32])
    wide, high = (int.from_bytes(head[i : i + 4], "big") for i in (16, 20))
    return (
        f'<img src="data:image/png;base64,{held}" alt="{escape(alt)}" width="{wide}" height="{high}" class="img-fluid"'
        f' style="--least:{math.ceil(wide * LEAST / USUAL)}px">'
    )


IMG = re.compile(r'<img src="([^"]*)" style="width:(\d+)px;max-width:100%" decoding="sync" alt="([^"]*)">')


def frame(html):
    "A frame of an explorer with its figures as elements of the page."

    def shown(found):
        uri, wide, alt = unescape(found[1]), int(found[2]), unescape(found[3])
        if uri.startswith("data:image/svg+xml,"):
            return in_page(unquote(uri.partition(",")[2]), alt)
        return found[0].replace("max-width:100%", f"--least:{math.ceil(wide * LEAST / USUAL)}px", 1)

    return IMG.sub(shown, html)


def explorer(html):
    "An explorer as a notebook keeps it, with the figures of all its frames as elements of the page."

    def turned(found):
        held = [f and frame(f) for f in json.loads(found[1])]
        text = json.dumps(held, ensure_ascii=False, separators=(",", ":"))
        return " frames = " + text.replace("</", r"<\/").replace("<!", r"\u003c!") + ";\n"

    shown = re.sub(
        r'(?<=<div class="mz-frame" aria-live="polite">).*?(?=</div><script>)', lambda m: frame(m[0]), html, flags=re.S
    )
    return re.sub(r" frames = (\[.*\]);\n", turned, shown, count=1)
