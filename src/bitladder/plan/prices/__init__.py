"""What a step down of a tensor's type costs in KLD: measured swaps, and a law through them."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.plan.prices.document import PriceCheck, PricedFrom, TensorPrices, TypePrices, load_prices
    from bitladder.plan.prices.fisher_prices import FISHER_PRICES, price_by_gradients
    from bitladder.plan.prices.menu import Menus, Window, measured_speeds, menu_types, tensor_menu, within_speed
    from bitladder.plan.prices.price import PRICES, PriceSource, price

__all__ = [
    "FISHER_PRICES",
    "PRICES",
    "Menus",
    "PriceCheck",
    "PriceSource",
    "PricedFrom",
    "TensorPrices",
    "TypePrices",
    "Window",
    "load_prices",
    "measured_speeds",
    "menu_types",
    "price",
    "price_by_gradients",
    "tensor_menu",
    "within_speed",
]
open_door(__name__)
