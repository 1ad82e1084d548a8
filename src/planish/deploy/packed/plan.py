"""The plan of what is quantized, and how, as JSON: scheme, formats, and the products and sites of the ledger.

A checkpoint holds the plan itself and not only the scheme, so that loading runs no forward pass: the size of its images
would come from the file.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from planish.deploy.packed.values import get, is_shape, make, shown
from planish.errors import PlanishError
from planish.network import Assignment, Product, Site
from planish.scheme import Format, Scheme


def write_plan(plan: Assignment) -> dict[str, Any]:
    """The plan as plain values."""
    formats = list(dict.fromkeys(fmt for fmt in plan.formats.values() if fmt is not None))
    inside = {product.name for product in plan.products}
    scheme = asdict(plan.scheme)
    if not plan.scheme.heads:  # as files were before it was there
        del scheme["heads"]
    return {
        "scheme": scheme, "formats": [asdict(fmt) for fmt in formats],
        "products": [_product_to_dict(product, plan, formats) for product in plan.products],
        "allowed": [product.name for product in plan.allowed if product.name in inside],
        "unreachable": [
            [p.module, p.key, p.operator, p.macs] for p in plan.allowed if p.name not in inside
        ],
    }  # fmt: skip


def _product_to_dict(product: Product, plan: Assignment, formats: list[Format]) -> dict[str, Any]:
    sites = []
    for site in product.sites:
        values: dict[str, Any] = {"slot": site.slot, "role": site.role, "shape": list(site.shape)}
        fmt = plan.formats[site.name]
        optional = {
            "owner": None if site.owner == product.module else site.owner, "axis": site.channel_axis,
            "parameter": site.parameter or None, "format": None if fmt is None else formats.index(fmt),
        }  # fmt: skip
        sites.append(values | {name: value for name, value in optional.items() if value is not None})
    return {"module": product.module, "key": product.key, "operator": product.operator, "macs": product.macs,
            "sites": sites}  # fmt: skip


_FORMAT = {"bits": int, "granularity": str, "symmetric": bool, "half_integer": bool, "group_size": int, "observer": str}


def _format(values: Any) -> Format:
    return make(Format, values, _FORMAT, "a format")


def read_plan(values: dict[str, Any]) -> Assignment:
    """The plan from its JSON.

    Raises:
        PlanishError: a value is missing, of another type than expected, or out of its bounds.
    """
    formats = [_format(value) for value in get(values, "formats", list)]
    chosen: dict[str, Format | None] = {}
    products = tuple(_product(value, formats, chosen) for value in get(values, "products", list))
    by_name = {product.name: product for product in products}
    if len(by_name) != len(products):
        raise PlanishError("its metadata: a product occurs twice")
    allowed = []
    for name in get(values, "allowed", list):
        if not isinstance(name, str) or name not in by_name:
            raise PlanishError(f"its metadata: {shown(name)} is allowed, but there is no such product")
        allowed.append(by_name[name])
    for value in get(values, "unreachable", list):
        if not isinstance(value, list) or [type(part) for part in value] != [str, str, str, int]:
            raise PlanishError("its metadata: unreachable holds something else than products")
        allowed.append(Product(value[0], value[1], value[2], (), value[3]))
    return Assignment(_scheme(get(values, "scheme", dict)), products, chosen, tuple(allowed))


def _scheme(values: dict[str, Any]) -> Scheme:
    def scheme(**fields: Any) -> Scheme:
        overrides = fields["overrides"]
        if not all(isinstance(o, list) and [type(part) for part in o] == [str, str] for o in overrides):
            raise PlanishError("a scheme: overrides holds something else than pairs of names")
        fields["weights"] = _format(fields["weights"])
        fields["activations"] = fields["activations"] and _format(fields["activations"])
        return Scheme(**{**fields, "overrides": tuple((a, b) for a, b in overrides)})

    nothing = type(None)
    types = {"name": str, "weights": dict, "activations": (dict, nothing), "edge_bits": (int, nothing),
             "overrides": list, "heads": bool}  # fmt: skip
    return make(scheme, {"heads": False, **values}, types, "a scheme")


def _product(value: Any, formats: list[Format], chosen: dict[str, Format | None]) -> Product:
    where = "a product"
    module = get(value, "module", str, where)
    sites = tuple(_site(site, module, formats, chosen) for site in get(value, "sites", list, where))
    macs = get(value, "macs", int, where)
    if not 0 <= macs < 2**60:
        raise PlanishError(f"a product: macs is {shown(macs)}, expected a count")
    return Product(module, get(value, "key", str, where), get(value, "operator", str, where), sites, macs)


def _site(value: Any, module: str, formats: list[Format], chosen: dict[str, Format | None]) -> Site:
    where, slot, shape = "a site", get(value, "slot", str, "a site"), get(value, "shape", list, "a site")
    owner = get({"owner": module, **value}, "owner", str, where)
    axis = get({"axis": None, **value}, "axis", (int, type(None)), where)
    parameter = get({"parameter": False, **value}, "parameter", bool, where)
    index = get({"format": None, **value}, "format", (int, type(None)), where)
    role = get(value, "role", str, where)
    name = f"{owner}.{slot}" if owner else slot
    if not is_shape(shape) or (axis is not None and not 0 <= axis < len(shape)):
        raise PlanishError(f"the site {shown(name)} has no sound shape and axis")
    if role not in ("weight", "input", "operand") or (parameter and role != "weight"):
        raise PlanishError(f"the site {shown(name)} has the role {shown(role)}, expected weight, input or operand")
    if index is not None and not 0 <= index < len(formats):
        raise PlanishError(f"the site {shown(name)} has format {index} of {len(formats)}")
    fmt = None if index is None else formats[index]
    if chosen.setdefault(name, fmt) != fmt:
        raise PlanishError(f"the site {shown(name)} has two formats")
    return Site(name, owner, slot, role, tuple(shape), axis, parameter)
