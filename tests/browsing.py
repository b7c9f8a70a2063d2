"""How wide the screens are on which pages are looked at."""

PHONE, DESKTOP = {"width": 360, "height": 780}, {"width": 1280, "height": 900}
